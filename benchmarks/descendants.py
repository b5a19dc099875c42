"""Ending all that a process has started, also what became an orphan or a session of its own. Linux, standard
library."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

# Numbers of prctl(2).
_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """From now on this process becomes the parent of descendants that lose theirs, so that
    ``end_descendants`` finds them."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    """For a child before it runs its program: it gets SIGTERM when its parent is gone, even one that was
    killed."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Process ids of children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold anything; state and parent follow it.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        own = children.get(waiting.pop(), [])
        found += own
        waiting += own
    return found


def end_descendants() -> None:
    """Kills all of them; those that start others meanwhile are found in a further round."""
    for _ in range(3):
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
