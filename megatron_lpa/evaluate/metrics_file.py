"""Reading ``metrics.jsonl``, the record that training leaves in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lpa.errors import UserError

METRICS = "metrics.jsonl"
Record = dict[str, Any]
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
    """
    path = folder / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a run folder") from error
    return [_record(path, number, line) for number, line in enumerate(lines[:-1], start=1) if line.strip()]


def records_of(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind: ``train``, ``valid``, ``test`` or ``event``."""
    return [record for record in records if record["kind"] == kind]


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error}); mend or remove the line") from None
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in _NEEDED:
        raise UserError(
            f"{path}:{number}: its kind is {kind!r}, not one of {', '.join(_NEEDED)}; mend or remove the line"
        )
    for name in _NEEDED[kind]:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(
                f"{path}:{number}: the {name} of this {kind} record is {value!r}, not a number; mend or remove "
                "the line"
            )
    return dict(record)
