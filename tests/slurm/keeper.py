"""Runs one daemon and owns everything that comes of it, until its own standard input ends.

    python keeper.py COMMAND [ARGUMENT ...]

The kernel gives it every process that the daemon leaves behind (slurmd detaches its job steps), so that none
is ever lost. Its standard input is a pipe that the test run holds: however the run ends, even by SIGKILL, the
pipe closes. The daemon then gets SIGTERM and, after some seconds, all that is left gets SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_POLITE_S = 5.0


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``, at this moment."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may just have ended
            fields = stat.read_text().rpartition(")")[2].split()  # the name may hold blanks and brackets
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: list[int] = []
    new = [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def kill_descendants(pid: int) -> None:
    """SIGKILL to all processes below ``pid``, as a power cut would end them."""
    for process in descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _reap() -> bool:
    """Takes leave of ended children; whether any child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def main(command: list[str]) -> None:
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit("error: this kernel has no child subreapers")
    nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    daemon = os.posix_spawn(command[0], command, os.environ, file_actions=[nothing])
    while not select.select([0], [], [], 0.2)[0]:
        if not _reap():
            return
    with contextlib.suppress(ProcessLookupError):
        os.kill(daemon, signal.SIGTERM)
    deadline = time.monotonic() + _POLITE_S
    while time.monotonic() < deadline and daemon in descendants(os.getpid()):
        time.sleep(0.05)
        _reap()
    while _reap():
        kill_descendants(os.getpid())
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1:])
