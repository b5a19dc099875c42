"""Disks that do not answer the first time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_lpa import files


def first_looks_fail(
    patch: pytest.MonkeyPatch, below: Path, number: int, calls: tuple[str, ...] = ("scandir",)
) -> set[str]:
    """From here on each call of ``os`` named fails the first time for each path at or below a folder.

    Returns:
        the paths that failed, filled as it happens.
    """
    patch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    failed: set[str] = set()
    for call in calls:
        patch.setattr(os, call, _failing_once(call, str(below), number, failed))
    return failed


def _failing_once(call: str, below: str, number: int, failed: set[str]) -> object:
    real = getattr(os, call)
    seen: set[str] = set()

    def look(path: object = ".", *more: object, **named: object) -> object:
        if str(path).startswith(below) and str(path) not in seen:
            seen.add(str(path))
            failed.add(str(path))
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *more, **named)

    return look
