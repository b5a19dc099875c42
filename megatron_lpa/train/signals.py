"""Reasons to stop early, which the loop reads at the end of each step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import psutil

IMPATIENCE_S = 10.0


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Remembers the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP. Later ones change nothing, but for a SIGINT after ten
    seconds: whoever presses Ctrl-C again then wants out of a run that does not reach the end of its step.

    SIGHUP comes when the terminal is closed. Under ``nohup`` it is ignored, and stays so.

    The exit code of a run stopped by a signal is ``128 + signum``, as shells have it.

    The ``deepspeed`` command does not pass SIGTERM on: it dies, and its processes would train on without
    it. So a launcher that is gone counts as SIGTERM too. Make this object at the first line of a process, before the
    launcher can be gone.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._since_s = 0.0
        self._launchers = _launchers_above()

    def install(self) -> StopRequest:
        """Take over these signals of this process."""
        for signum in STOPPING:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._remember)
        return self

    def signum(self) -> int:
        """The signal to stop for; 0 to go on."""
        if not self._signum and self._launchers != _parents(len(self._launchers)):
            self._signum = signal.SIGTERM
        return self._signum

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if not self._signum:
            self._signum, self._since_s = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self._since_s > IMPATIENCE_S:
            os._exit(128 + signum)


def stopped_line(signum: int, step: int, saved_step: int) -> str:
    """What a run that a signal has stopped says last: what is left of it, and how it goes on.

    Args:
        signum: the signal.
        step: that it has done.
        saved_step: of its newest checkpoint; -1 without one.
    """
    stopped = f"stopped by {signal.Signals(signum).name} after step {step:,}"
    if saved_step < 0:
        return f"{stopped}, with nothing saved; the same command starts the run anew"
    saved = "which is saved" if saved_step == step else f"saved at step {saved_step:,}"
    return f"{stopped}, {saved}; the same command continues"


def _parents(count: int) -> list[int]:
    """Process ids of the parent, its parent, and so on; fewer where one is gone."""
    found: list[int] = []
    pid = os.getpid()
    try:
        for _ in range(count):
            pid = psutil.Process(pid).ppid()
            found.append(pid)
    except psutil.Error:
        pass
    return found


def _launchers_above() -> list[int]:
    """The per-node launcher and the ``deepspeed`` command above it, or nothing without them."""
    pids = _parents(2)
    try:
        commands = [" ".join(psutil.Process(pid).cmdline()) for pid in pids]
    except psutil.Error:
        return []
    if len(pids) == 2 and "deepspeed.launcher.launch" in commands[0] and "deepspeed" in commands[1]:
        return pids
    return []
