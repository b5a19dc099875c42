"""Ends a run that hangs, and says where: which rank, in which stage of which step, with the stacks of its
threads."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_lpa.errors import EXIT_HANG
from megatron_lpa.files import new_file
from megatron_lpa.run_folder import HANG, LOGS

Result = TypeVar("Result")

FOLDER = f"{LOGS}/{HANG}"
WAITING = "waiting for other ranks"
_OTHERS_S = 8.0
"""For the other ranks' time to be up as well, and for them to read where this one is. Each looks every 5
s."""

BOARD_S = 3.0
"""For the store to answer: the rank that serves it may be what hangs."""

LAST_WORDS_S = 15.0
"""For all that is said and written when time is up: what hangs may be the disk that it is written to."""

BACKSTOP_S = 60.0
_MOST_NAMED = 20


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank is.

    Args:
        stage: in words that follow "rank 3 is".
        step: optimizer steps done; -1 before the first.
        waits: whether it has done its own part of the stage and waits for others.
        since_s: since when, by this process's ``time.monotonic``.
    """

    stage: str
    step: int = -1
    waits: bool = False
    since_s: float = field(default_factory=time.monotonic, compare=False)

    def __str__(self) -> str:
        stage = self.stage
        if self.waits:
            stage = f"{WAITING} ({stage})"
        return stage if self.step < 0 else f"{stage} after {self.step} steps"


class Watchdog:
    """Watches how long this process has been in one stage, from its first line on.

    A rank that hangs makes all others wait in a collective. So each that has been in one stage for half its
    time puts that on a board, which is a connection of its own to the store at which the processes met: no
    disk is needed. When time is up, each reads the board and names the ranks to look at: never one that
    waits.

    Nothing that is done then can keep the process from ending: another thread ends it after ``LAST_WORDS_S``.
    Native code that keeps Python's lock stops both threads; a timer of ``faulthandler``, which needs no lock,
    then ends the process with 1 when its time has been up for as long again and a minute.

    Time during which the whole process stood still (SIGSTOP, a suspended machine) does not count, up to that
    timer.

    Args:
        rank: of this process.
        leave: ends the process; replaced in tests.
    """

    def __init__(self, rank: int = 0, leave: Callable[[int], object] = os._exit) -> None:
        self._rank, self._leave = rank, leave
        self._limit_s, self._limit_key = 0.0, ""
        self._folder: Path | None = None
        self._board: Any = None
        self._asks: threading.Thread | None = None
        self._world_size = 1
        self._posted = self._gave_up = False
        self.where = Whereabouts("starting")
        """What this process does now. The loop sets it, and the thread that watches reads it."""
        self._counts_from_s = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self, limit_s: float, key: str = "train.start_timeout_s") -> None:
        """Begin to watch.

        Args:
            limit_s: seconds in one stage from which on it is a hang; 0 never is.
            key: of the configuration, that sets it.
        """
        self.limit(limit_s, key)
        self._thread.start()

    def limit(self, limit_s: float, key: str) -> None:
        """Watch with another limit from now on; arguments as for ``start``."""
        self._counts_from_s = time.monotonic()
        self._limit_s, self._limit_key = limit_s, key

    def join_board(self, board: Any, world_size: int) -> None:
        """Tell others, and learn of them.

        Args:
            board: a ``torch.distributed`` store that no other thread uses; None for a process alone.
            world_size: processes in all.
        """
        self._world_size, self._board = world_size, board

    def write_stacks_to(self, run_folder: Path) -> None:
        """Write stacks to ``logs/hang`` in the run folder, which is ours now; before, they go to stderr."""
        self._folder = run_folder / FOLDER

    def stop(self) -> None:
        """No longer watch."""
        self._stopped.set()
        if self._thread.ident is not None:
            faulthandler.cancel_dump_traceback_later()

    def finish(self) -> None:
        """Where time was up, do not get ahead of what it says: others' ends are errors here, and follow from
        it."""
        if self._gave_up:
            self._thread.join(LAST_WORDS_S)

    def enter(self, stage: str, step: int = -1) -> None:
        """Tell what comes next, as ``Whereabouts`` has it."""
        self.where = Whereabouts(stage, step)

    def wait(self, waits: bool) -> None:
        """Tell that this process now waits for others, or that they have come."""
        self.where = Whereabouts(self.where.stage, self.where.step, waits)

    def _watch(self) -> None:
        looked_s = time.monotonic()
        while True:
            limit_s = self._limit_s
            every_s = min(limit_s / 4, 5.0) if limit_s else 5.0
            if limit_s:
                # Begun anew at each look; only when no look comes, because this thread cannot run, does it go
                # off.
                faulthandler.dump_traceback_later(2 * limit_s + BACKSTOP_S, exit=True, file=2)
            else:
                faulthandler.cancel_dump_traceback_later()
            if self._stopped.wait(every_s):
                faulthandler.cancel_dump_traceback_later()
                return
            now_s = time.monotonic()
            if now_s - looked_s > 2 * every_s + 1:  # this thread did not run either
                self._counts_from_s = now_s
            looked_s = now_s
            waited_s = now_s - max(self.where.since_s, self._counts_from_s)
            if limit_s and limit_s == self._limit_s:
                if waited_s > limit_s:
                    self._give_up(waited_s)
                    return
                self._post(waited_s > limit_s / 2)
                looked_s = time.monotonic()  # the board may have taken its time

    def _post(self, long: bool) -> None:
        """Put on the board where this rank is, or take it off."""
        if self._board is None or not (long or self._posted):
            return
        text = json.dumps(asdict(self.where) if long else None)
        if self._briefly(lambda: self._board.set(f"whereabouts/{self._rank}", text) or True):
            self._posted = long

    def _give_up(self, waited_s: float) -> None:
        self._gave_up = True
        # First of all: whatever comes next may block, even a print.
        threading.Thread(target=self._leave_anyway, name="watchdog's end", daemon=True).start()
        where = self.where
        told = f"rank {self._rank} is {where}, for {waited_s:.0f} s ({self._limit_key})"
        stacks = None if self._folder is None else self._folder / f"rank_{self._rank:05d}.txt"
        say(f"{told}; stacks of its threads go to {stacks or 'stderr'}")
        # The board before the disk, which is what hangs more often.
        self._post(True)
        for line in self._suspects():
            say(line)
        self._write_stacks(stacks, told)
        # Rank 0 serves the board: it stays until the others have read it.
        time.sleep(min(_OTHERS_S, 2 * self._limit_s))
        self._leave(EXIT_HANG)

    def _suspects(self) -> list[str]:
        if self._world_size == 1:
            return []
        found = None if self._board is None else self._briefly(self._ask_board)
        if found is None:
            return [
                "rank 0, which knows where the others are, does not answer: look at it first, and whether "
                "this machine reaches it"
            ]
        return suspects({**found, self._rank: self.where}, self._world_size)

    def _briefly(self, work: Callable[[], Result]) -> Result | None:
        """What ``work`` gives within ``BOARD_S``; None where it fails, or hangs, as with a rank 0 that stands
        still."""
        if self._asks is not None and self._asks.is_alive():  # the last attempt still hangs
            self._asks.join(BOARD_S)
            if self._asks.is_alive():
                return None
        results: list[Result] = []

        def attempt() -> None:
            with contextlib.suppress(RuntimeError, ValueError):
                results.append(work())

        self._asks = threading.Thread(target=attempt, name="watchdog's board", daemon=True)
        self._asks.start()
        self._asks.join(BOARD_S)
        return results[0] if results else None

    def _ask_board(self) -> dict[int, Whereabouts]:
        found = {}
        for rank in range(self._world_size):
            key = f"whereabouts/{rank}"
            content = json.loads(self._board.get(key)) if self._board.check([key]) else None
            if content is not None:
                found[rank] = Whereabouts(**content)
        return found

    def _write_stacks(self, path: Path | None, told: str) -> None:
        if path is None:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return
        try:
            # Not the run folder itself: it may have been moved.
            for folder in (path.parents[1], path.parent):
                folder.mkdir(exist_ok=True)
            with new_file(path) as file:
                file.write(f"{told}\n\n".encode())
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # the disk may be what is wrong
            say(f"rank {self._rank}'s stacks cannot be written: {error}")
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _leave_anyway(self) -> None:
        time.sleep(LAST_WORDS_S)
        self._leave(EXIT_HANG)


def say(line: str) -> None:
    """A line on stderr."""
    # Not logged: the process may hang inside a handler, whose lock this thread would then wait for.
    print(f"error: {line}", file=sys.stderr, flush=True)


def suspects(reports: Mapping[int, Whereabouts], world_size: int) -> list[str]:
    """Which ranks to look at first, in words: never one that waits for others.

    Args:
        reports: where ranks have been for long, by rank. One of which nothing is heard stands still as a
            whole, or is gone.
        world_size: ranks in all.
    """
    lines = []
    at_work = {rank: where for rank, where in reports.items() if not where.waits}
    waiting = len(reports) - len(at_work)
    places = [str(where) for where in at_work.values()]
    if waiting:
        odd, against = at_work, f"and {waiting} wait{'s' * (waiting == 1)} for it"
    else:
        usual = max(sorted(set(places)), key=places.count) if places else ""
        if places.count(usual) * 2 <= len(places) and len(set(places)) > 1:
            named = ", ".join(
                f"rank {rank} is {where}" for rank, where in sorted(at_work.items())[:_MOST_NAMED]
            )
            return [f"the ranks are at different places: {named}", *_silent(reports, world_size)]
        odd = {rank: where for rank, where in at_work.items() if str(where) != usual}
        against = f"where most ranks are {usual}"
    for rank in sorted(odd, key=lambda rank: (odd[rank].step, rank))[:_MOST_NAMED]:
        lines.append(f"rank {rank} is {odd[rank]}, {against}: look at it first")
    silent = _silent(reports, world_size)
    if waiting and not lines and not silent and world_size > 1:
        lines.append("all ranks wait for each other: look at the network between them")
    return lines + silent


def _silent(reports: Mapping[int, Whereabouts], world_size: int) -> list[str]:
    silent = sorted(set(range(world_size)) - set(reports))
    if not silent:
        return []
    named = ", ".join(map(str, silent[:_MOST_NAMED])) + (", ..." if len(silent) > _MOST_NAMED else "")
    return [
        f"nothing is heard of {len(silent)} of {world_size} ranks ({named}): each stands still as a whole, "
        "is gone, or has not been in one place for long: look there first"
    ]
