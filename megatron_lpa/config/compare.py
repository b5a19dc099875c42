"""What differs between two configs, key by key."""

from __future__ import annotations

from typing import Any


def differences(saved: Any, own: Any, name: str = "") -> list[str]:
    """``key was x, is y`` for every leaf in which two nested dictionaries differ.

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
    return [] if saved == own else [f"{name} was {saved}, is {own}"]
