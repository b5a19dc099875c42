"""Ends a run that hangs, and says where: which rank, in which stage of which step, with the stacks of its threads."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_lpa.errors import EXIT_HANG

FOLDER = "logs/hang"
_OTHERS_S = 5.0  # for the other ranks to tell where they are
LAST_WORDS_S = 15.0
"""For all that is written when time is up: what hangs may be the disk that it is written to."""

BACKSTOP_S = 60.0
_MOST_NAMED = 20


class Watchdog:
    """Watches how long this process has been in one stage.

    A rank that hangs makes all others wait in a collective. So each says where it is when its time is up, and the
    first ones to do so wait a little and name those that are elsewhere than most.

    Nothing that is done then can keep the process from ending: another thread ends it after ``LAST_WORDS_S``. Native code
    that keeps Python's lock stops both threads; a timer of ``faulthandler``, which needs no lock, then ends the process
    with 1 when its time has been up for as long again and a minute.

    Time during which the whole process stood still (SIGSTOP, a suspended machine) does not count, up to that timer.

    Args:
        run_folder: of the run; reports go to ``logs/hang`` inside.
        rank: of this process.
        limit_s: seconds in one stage from which on it is a hang; 0 never is.
        leave: ends the process; replaced in tests.
        world_size: processes in all.
    """

    def __init__(
        self,
        run_folder: Path,
        rank: int,
        limit_s: float,
        leave: Callable[[int], object] = os._exit,
        world_size: int = 1,
    ) -> None:
        self._folder, self._rank, self._limit_s, self._leave = run_folder / FOLDER, rank, limit_s, leave
        self._world_size = world_size
        self._stage, self._step, self._since_s = "starting", 0, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        if self._limit_s > 0:
            self._since_s = time.monotonic()
            self._thread.start()
            self._report_file().unlink(missing_ok=True)  # watched already: the disk may hang

    def stop(self) -> None:
        """No longer watch."""
        self._stopped.set()
        if self._thread.is_alive():
            faulthandler.cancel_dump_traceback_later()

    def enter(self, stage: str, step: int) -> None:
        """Tell what comes next.

        Args:
            stage: in words that follow "rank 3 is".
            step: optimizer steps done.
        """
        self._stage, self._step, self._since_s = stage, step, time.monotonic()

    def _watch(self) -> None:
        every_s = min(self._limit_s / 4, 5.0)
        looked_s = time.monotonic()
        while True:
            # Begun anew at each look; only when no look comes, because this thread cannot run, does it go off.
            faulthandler.dump_traceback_later(2 * self._limit_s + BACKSTOP_S, exit=True, file=2)
            if self._stopped.wait(every_s):
                faulthandler.cancel_dump_traceback_later()
                return
            now_s = time.monotonic()
            if now_s - looked_s > 2 * every_s + 1:  # this thread did not run either
                self._since_s = now_s
            looked_s = now_s
            if now_s - self._since_s > self._limit_s:
                self._give_up(now_s - self._since_s)
                return

    def _give_up(self, waited_s: float) -> None:
        # First of all: whatever comes next may block, even a print.
        threading.Thread(target=self._leave_anyway, name="watchdog's end", daemon=True).start()
        stage, step = self._stage, self._step
        told = f"rank {self._rank} is {stage} after {step} steps, for {waited_s:.0f} s (train.step_timeout_s)"
        stacks = self._folder / f"rank_{self._rank:05d}.txt"
        print(f"error: {told}; stacks of its threads go to {stacks}", file=sys.stderr, flush=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            report = {"rank": self._rank, "stage": stage, "step": step, "time": time.time()}
            partial = self._folder / f".rank_{self._rank:05d}.json"
            partial.write_text(json.dumps(report))
            partial.replace(self._report_file())
            with open(stacks, "w") as file:
                file.write(f"{told}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # the disk may be what is wrong
            print(
                f"error: rank {self._rank}'s stacks cannot be written: {error}", file=sys.stderr, flush=True
            )
        time.sleep(min(_OTHERS_S, 2 * self._limit_s))
        for line in odd_ones(self._folder, self._world_size):
            print(f"error: {line}", file=sys.stderr, flush=True)
        self._leave(EXIT_HANG)

    def _leave_anyway(self) -> None:
        time.sleep(LAST_WORDS_S)
        self._leave(EXIT_HANG)

    def _report_file(self) -> Path:
        return self._folder / f"rank_{self._rank:05d}.json"


def odd_ones(folder: Path, world_size: int = 0, recent_s: float = 600.0) -> list[str]:
    """Which ranks were elsewhere than most when their time was up, from the reports of the last minutes.

    A rank below ``world_size`` without a report is one too: it stands still as a whole, or is gone.
    """
    reports = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            report = json.loads(path.read_text())
            # A date ahead of this clock is of before the clock was set back, or of a machine whose clock is wrong.
            if abs(time.time() - report["time"]) < recent_s:
                reports.append((int(report["rank"]), f"{report['stage']} after {report['step']} steps"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    places = [place for _, place in reports]
    usual = max(sorted(set(places)), key=places.count) if places else ""
    lines = [
        f"rank {rank} is {place}, where most ranks are {usual}: look at it first"
        for rank, place in reports
        if place != usual
    ]
    silent = sorted(set(range(world_size)) - {rank for rank, _ in reports})
    if reports and silent:
        named = ", ".join(map(str, silent[:_MOST_NAMED])) + (", ..." if len(silent) > _MOST_NAMED else "")
        lines.append(
            f"nothing is heard of {len(silent)} of {world_size} ranks ({named}): each stands still as a whole, is gone, "
            "or cannot write here"
        )
    return lines
