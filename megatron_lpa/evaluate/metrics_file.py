"""Reading ``metrics.jsonl``, the record that training leaves in a run folder."""

from __future__ import annotations

import math
import reprlib
from pathlib import Path

from megatron_lpa.errors import UserError
from megatron_lpa.records import Line, NoRecord, Record, is_finite_number, read_lines
from megatron_lpa.run_folder import METRICS

__all__ = ["METRICS", "Record", "read_metrics", "records_of"]

_NEEDED = {
    "train": ("step", "tokens", "loss", "step_ms"),
    "valid": ("step", "tokens", "loss"),
    "test": ("step", "tokens", "loss"),
    "event": (),
}


def read_metrics(folder: Path) -> list[Record]:
    """All records of a run folder, in order.

    A last line without its newline is a record still being written, and left out.

    Raises:
        UserError: no such file, or a line that is not a record, with its number.
        TryAgain: the disk does not give it, or the run wrote it anew meanwhile.
    """
    path = folder / METRICS
    try:
        return [_record(path, line) for line in read_lines(path) if line.ended]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a run folder") from error


def records_of(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind: ``train``, ``valid``, ``test`` or ``event``."""
    return [record for record in records if record["kind"] == kind]


def _record(path: Path, line: Line) -> Record:
    try:
        record = line.record()
        if record["kind"] not in _NEEDED:
            raise NoRecord(f"its kind is {record['kind'][:100]!r}, not one of {', '.join(_NEEDED)}")
        for name in _NEEDED[record["kind"]]:
            value = record.get(name)
            if not is_finite_number(value) and not (name == "loss" and _is_not_finite(value)):
                raise NoRecord(
                    f"the {name} of this {record['kind']} record is {reprlib.repr(value)}, not a number"
                )
    except NoRecord as problem:
        raise UserError(f"{path}:{line.number}: {problem}; mend or remove the line") from None
    return record


def _is_not_finite(loss: object) -> bool:
    """Whether it stands for a loss that was not finite; JSON has no number for it."""
    return loss is None or (isinstance(loss, float) and not math.isfinite(loss))
