"""Reading ``metrics.jsonl``, the record that training leaves in a run folder."""

from __future__ import annotations

from pathlib import Path

from megatron_lpa.errors import UserError
from megatron_lpa.records import Line, NoRecord, NoStep, Record, read_lines
from megatron_lpa.run_folder import METRICS

__all__ = ["METRICS", "Record", "read_metrics", "records_of"]


def read_metrics(folder: Path) -> list[Record]:
    """All records of a run folder, in order.

    A last line without its newline is a record still being written, and left out. What is a record is what a
    run that is started again keeps, so that it mends whatever is refused here. Kinds of callbacks are among
    them, where they have a step.

    Raises:
        UserError: no such file, or a line that is not a record, with its number.
        TryAgain: the disk does not give it, or the run wrote it anew meanwhile.
    """
    path = folder / METRICS
    try:
        found = [_record(path, line) for line in read_lines(path) if line.ended]
        return [record for record in found if record is not None]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a run folder") from error


def records_of(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind, as ``train``, ``valid``, ``test`` or ``event``."""
    return [record for record in records if record["kind"] == kind]


def _record(path: Path, line: Line) -> Record | None:
    try:
        return line.record()
    except NoStep:
        return None
    except NoRecord as problem:
        raise UserError(f"{path}:{line.number}: {problem}; mend or remove the line") from None
