"""What becomes a record: any mapping that a callback hands in, as one line of JSON that every reader takes.

JSON has no number that is not finite. Such a value is written as null, and ``not_finite`` beside it says what
it was: ``{"loss": null, "not_finite": {"loss": "nan"}}``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_lpa.errors import shown
from megatron_lpa.records import MOST_RECORD_BYTES, Line, NoRecord, Record

NOT_FINITE = "not_finite"
OURS = ("time", NOT_FINITE)
"""Keys that are added here, so that nobody else may use them."""

MOST_TEXT = 200
"""Characters of a value that JSON has nothing for."""


class CannotRecord(ValueError):
    """Why a mapping is no record, and what to do about it, in words that follow its kind."""


@dataclass
class _Notes:
    """What was not as JSON has it, by the dotted path of its key."""

    not_finite: dict[str, str] = field(default_factory=dict)
    as_text: list[str] = field(default_factory=list)


def finished(given: Mapping[str, Any], step: int, time: float) -> tuple[Record, list[str]]:
    """A record as it is written.

    Numbers of numpy and torch become numbers, their arrays lists. What JSON has nothing for becomes text.

    Args:
        given: what a callback has to say; a step of its own comes before ``step``.
        step: of the run now.
        time: seconds since 1970.

    Returns:
        the record, and the keys whose values have become text.

    Raises:
        CannotRecord: no reader would take it.
    """
    if not isinstance(given, Mapping):
        raise CannotRecord("no mapping of names to values; give a dict")
    if taken := [name for name in OURS if name in given]:
        raise CannotRecord(f"the key {taken[0]!r} is added to every record; give the value another name")
    notes = _Notes()
    try:
        values = {str(key): _value(value, str(key), notes) for key, value in given.items()}
    except RecursionError as error:
        raise CannotRecord("its values are nested too deeply; give fewer levels") from error
    kind = values.get("kind")
    if not isinstance(kind, str) or not kind or not kind.isprintable():
        raise CannotRecord("its kind has to be a text; say what it is a record of")
    values.setdefault("step", step)
    if isinstance(values["step"], float) and values["step"].is_integer():
        values["step"] = int(values["step"])
    if isinstance(values["step"], bool) or not isinstance(values["step"], int):
        raise CannotRecord(f"its step is {shown(given['step'])}, not a whole number of steps")
    record = {**values, "time": time}
    if notes.not_finite:
        record[NOT_FINITE] = notes.not_finite
    try:
        line = encoded(record)
        Line(0, line, ended=True, too_long=len(line) if len(line) > MOST_RECORD_BYTES else 0).record()
    except (NoRecord, ValueError) as problem:
        raise CannotRecord(f"{problem}; mend the record, or use another kind") from problem
    return record, notes.as_text


def encoded(record: Mapping[str, Any]) -> bytes:
    """A record as a line without its newline.

    Raises:
        ValueError: a number of more digits than Python writes.
    """
    try:
        return json.dumps(record, allow_nan=False).encode()
    except (TypeError, ValueError):  # not from ``finished``
        return json.dumps(finite(record), allow_nan=False).encode()


def finite(value: Any) -> Any:
    """A value as JSON can hold it: null where a number is not finite."""
    return _value(value, "", _Notes())


def _value(value: Any, path: str, notes: _Notes) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        notes.not_finite[path] = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return None
    if isinstance(value, Mapping):
        return {str(key): _value(item, f"{path}.{key}", notes) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(item, f"{path}.{number}", notes) for number, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return str(value)
    try:
        plain = value.tolist() if hasattr(value, "tolist") else value  # of numpy and torch
    except Exception:  # a tensor without data, or a sparse one
        plain = value
    if plain is not value:
        return _one_number(plain, path, notes)
    notes.as_text.append(path)
    try:
        return repr(value)[:MOST_TEXT]
    except Exception as error:
        name = type(value).__name__
        raise CannotRecord(f"its {path or 'value'} is a {name} that cannot be shown ({error})") from error


def _one_number(plain: Any, path: str, notes: _Notes) -> Any:
    """An array of one number stands for it."""
    while isinstance(plain, list) and len(plain) == 1:
        plain = plain[0]
    return _value(plain, path, notes)
