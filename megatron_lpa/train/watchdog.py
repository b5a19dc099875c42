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

EXIT_HANG = 75
"""``EX_TEMPFAIL`` of sysexits.h: trying again may help."""

FOLDER = "logs/hang"
_OTHERS_S = 5.0  # for the other ranks to tell where they are


class Watchdog:
    """Watches how long this process has been in one stage.

    A rank that hangs makes all others wait in a collective. So each writes where it is when its time is up, and the
    first ones to do so wait a little and name those that are elsewhere than most.

    Time during which the whole process stood still (SIGSTOP, a suspended machine) does not count.

    Args:
        run_folder: of the run; reports go to ``logs/hang`` inside.
        rank: of this process.
        limit_s: seconds in one stage from which on it is a hang; 0 never is.
        leave: ends the process; replaced in tests.
    """

    def __init__(
        self, run_folder: Path, rank: int, limit_s: float, leave: Callable[[int], object] = os._exit
    ) -> None:
        self._folder, self._rank, self._limit_s, self._leave = run_folder / FOLDER, rank, limit_s, leave
        self._stage, self._step, self._since_s = "starting", 0, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        if self._limit_s > 0:
            (self._folder / f"rank_{self._rank:05d}.json").unlink(missing_ok=True)
            self._since_s = time.monotonic()
            self._thread.start()

    def stop(self) -> None:
        """No longer watch."""
        self._stopped.set()

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
        while not self._stopped.wait(every_s):
            now_s = time.monotonic()
            if now_s - looked_s > 2 * every_s + 1:  # this thread did not run either
                self._since_s = now_s
            looked_s = now_s
            if now_s - self._since_s > self._limit_s:
                self._give_up(now_s - self._since_s)
                return

    def _give_up(self, waited_s: float) -> None:
        stage, step = self._stage, self._step
        told = f"rank {self._rank} is {stage} after {step} steps, for {waited_s:.0f} s (train.step_timeout_s)"
        stacks = self._folder / f"rank_{self._rank:05d}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(stacks, "w") as file:
                file.write(f"{told}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            report = {"rank": self._rank, "stage": stage, "step": step, "time": time.time()}
            partial = self._folder / f".rank_{self._rank:05d}.json"
            partial.write_text(json.dumps(report))
            partial.replace(self._folder / f"rank_{self._rank:05d}.json")
            where = f"; stacks of its threads are in {stacks}"
        except OSError as error:  # the disk may be what hangs
            where = f"; its stacks cannot be written: {error}"
        print(f"error: {told}{where}", file=sys.stderr, flush=True)
        time.sleep(min(_OTHERS_S, 2 * self._limit_s))
        for line in odd_ones(self._folder):
            print(f"error: {line}", file=sys.stderr, flush=True)
        self._leave(EXIT_HANG)


def odd_ones(folder: Path, recent_s: float = 600.0) -> list[str]:
    """Which ranks were elsewhere than most when their time was up, from the reports of the last minutes.

    A rank without a report is one too: it stands still as a whole, or is gone.
    """
    reports = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            report = json.loads(path.read_text())
            if time.time() - report["time"] < recent_s:
                reports.append((int(report["rank"]), f"{report['stage']} after {report['step']} steps"))
        except (OSError, ValueError, KeyError):
            continue
    places = [place for _, place in reports]
    if len(set(places)) < 2:
        return []
    usual = max(sorted(set(places)), key=places.count)
    return [
        f"rank {rank} is {place}, where most ranks are {usual}: look at it first"
        for rank, place in reports
        if place != usual
    ]
