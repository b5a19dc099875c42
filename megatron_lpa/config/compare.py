"""What differs between two configs, key by key."""

from __future__ import annotations

from typing import Any

from megatron_lpa.errors import differing_parts, named


def completed(saved: Any, defaults: Any) -> Any:
    """A saved nested dictionary with the settings of ``defaults`` that it lacks: an earlier version did not
    have them, and did what they say by default. Where it has a section, only keys of that section are
    added."""
    if not (isinstance(saved, dict) and isinstance(defaults, dict)):
        return saved
    both = {key: completed(value, defaults.get(key)) for key, value in saved.items()}
    return {**both, **{key: value for key, value in defaults.items() if key not in saved}}


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
    was, now = differing_parts(_on_one_line(saved), _on_one_line(own))
    return [f"{named(name)} was {was}, is {now}"]


def listed(lines: list[str], most: int = 10, most_letters: int = 200) -> str:
    """Lines as one of reasonable length, whatever somebody wrote into a manifest."""
    shown = [line if len(line) <= most_letters else f"{line[:most_letters]}..." for line in lines[:most]]
    return "; ".join([*shown, f"and {len(lines) - most} more"] if len(lines) > most else shown)


def _on_one_line(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else repr(text)
