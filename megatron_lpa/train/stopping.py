"""Reasons to stop early: signals and problems of one rank, and how all ranks stop together."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import psutil

from megatron_lpa.errors import AgreedProblem
from megatron_lpa.parallel.agreement import FINE, gather_messages, largest_of_all, severity_of, worst_error
from megatron_lpa.parallel.groups import ParallelGroups

IMPATIENCE_S = 10.0

GO_ON, STOP, FAIL = 0, 1000, 2000
"""What a rank wishes: STOP carries the signal's number, FAIL a problem's severity, and the largest counts for
all."""

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Remembers the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP.

    Later ones change nothing, but for a SIGINT after ten seconds: whoever presses Ctrl-C again then wants out
    of a run that does not reach the end of its step.

    SIGHUP comes when the terminal is closed. Under ``nohup`` it is ignored, and stays so.

    The exit code of a run stopped by a signal is ``128 + signum``, as shells have it.

    The ``deepspeed`` command does not pass SIGTERM on: it dies, and its processes would train on without
    it. So a launcher that is gone counts as SIGTERM too. Make this object at the first line of a process,
    before the launcher can be gone.
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


class Stopping:
    """Why this rank cannot or does not want to go on, and what all ranks have agreed on.

    Args:
        groups: the ranks that stop together.
        request: whether this process was asked to stop.
    """

    def __init__(self, groups: ParallelGroups, request: StopRequest) -> None:
        self.stopped_by = 0
        """The signal that all ranks agreed to stop for; 0 while none came."""
        self.problem: Exception | None = None
        """What went wrong on this rank alone."""
        self._groups, self._request = groups, request
        self._waited_s = 0.0

    def report(self, problem: Exception | None) -> None:
        """Something may have gone wrong on this rank alone; the first problem counts.

        A rank that raised by itself would leave the others waiting in a collective. So the loop makes all
        ranks raise at the next agreement.

        Args:
            problem: it says whether another attempt may help.
        """
        self.problem = self.problem or problem

    def agree_to_go_on(self, problem: Exception | None) -> bool:
        """Whether all ranks can and want to go on: one small all-reduce on the CPU. Every rank calls it.

        Args:
            problem: what keeps this rank from going on.

        Raises:
            AgreedProblem: on all ranks, when any rank has a problem.
        """
        wish = self._request.signum()
        arrived = time.perf_counter()
        decision = largest_of_all(
            FAIL + severity_of(problem) if problem else STOP + wish if wish else GO_ON, self._groups
        )
        self._waited_s += time.perf_counter() - arrived
        if decision >= FAIL:
            message = gather_messages(None if problem is None else str(problem), self._groups)
            raise AgreedProblem(message, worst_error(decision - FAIL).exit_code)
        if decision >= STOP:
            self.stopped_by = decision - STOP
        return decision == GO_ON

    def take_waited_s(self) -> float:
        """Seconds that this process has waited for others in agreements since this was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def raise_problems(self) -> None:
        """At the end: what no agreement has told. Every rank calls it.

        Raises:
            UserError: on all ranks, when any has a problem; a TryAgain where starting again may help.
        """
        problem = self.problem
        if worst := largest_of_all(severity_of(problem) if problem else FINE, self._groups):
            raise worst_error(worst)(gather_messages(str(problem) if problem else None, self._groups))


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
