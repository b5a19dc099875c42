"""What differs between two configs, key by key."""

from __future__ import annotations

from typing import Any

from megatron_lpa.errors import named

MOST_OF_VALUE = 120
"""Characters of one: a stranger may have written more."""


def differences(saved: Any, own: Any, name: str = "") -> list[str]:
    """``key was x, is y`` for every leaf in which two nested dictionaries differ, each on one line.

    Args:
        saved: the earlier one.
        own: the present one.
        name: dotted key of both.
    """
    if isinstance(saved, dict) and isinstance(own, dict):
        prefix = f"{name}." if name else ""
        return [
            line
            for key in [*saved, *(key for key in own if key not in saved)]
            for line in differences(saved.get(key), own.get(key), f"{prefix}{key}")
        ]
    if saved == own:
        return []
    was, now = _on_one_line(saved), _on_one_line(own)
    # Of what is long, the part in which they differ.
    pairs = enumerate(zip(was, now, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(len(was), len(now)))
    start = max(0, same - MOST_OF_VALUE // 4)
    return [f"{named(name)} was {_part(was, start)}, is {_part(now, start)}"]


def _on_one_line(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else repr(text)


def _part(text: str, start: int) -> str:
    if len(text) <= MOST_OF_VALUE:
        return text
    part = text[start : start + MOST_OF_VALUE]
    return f"{'...' if start else ''}{part}{'...' if start + len(part) < len(text) else ''}"
