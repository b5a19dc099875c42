"""A scenario from its first start to its last: strikes, starts again, and compares."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from fault_injection import checks, judge
from fault_injection.disk import SmallDisk, damage
from fault_injection.plan import BETWEEN, ENDING, MOVES, Fault, Scenario
from fault_injection.processes import remove_compile_locks
from fault_injection.runs import References, arguments
from fault_injection.start import Result, Start
from megatron_lpa.errors import EXIT_REFUSED

Say = Callable[[Result], None]


class Going:
    """A scenario being gone through.

    Args:
        scenario: which.
        folder: for its runs and logs.
        references: undisturbed runs.
        fresh: as ``Ranks``.
        say: told of every fault when it is known what became of it.
    """

    def __init__(
        self, scenario: Scenario, folder: Path, references: References, fresh: bool, say: Say
    ) -> None:
        self.scenario, self._folder, self._references = scenario, folder, references
        self._fresh, self._say = fresh, say
        self.starts = 0
        self.runs = 0
        self.compile_locks = 0
        """PyTorch's locks that killed processes left behind, and that were removed."""
        self.violations: list[str] = []
        """Of starts that no fault struck, and of complete runs."""
        self._queue = [fault for fault in scenario.faults if fault.kind != "nan"]
        self._nan = [fault for fault in scenario.faults if fault.kind == "nan"]
        self._nan_seen: set[int] = set()
        self._disk: SmallDisk | None = None
        if any(fault.kind == "disk-full" for fault in scenario.faults):
            self._disk = SmallDisk(folder / "disk")
        self.disk_kind = "" if self._disk is None else "tmpfs" if self._disk.mounted else "interposed writer"
        self._layout = scenario.layout
        self._moves = 0
        self._tries: dict[int, int] = {}

    # One run after another

    def go(self) -> None:
        """Until every fault has struck and the last run is complete."""
        try:
            while self._queue or not self.runs:
                self._one_run()
            if self._nan:
                self.violations.append(f"{len(self._nan)} faults of the kind nan did not strike")
        finally:
            if self._disk is not None:
                if self._disk.mounted:  # to be looked at later, where something went wrong
                    self._disk.empty()
                    shutil.copytree(self._run_dir, self._folder / "runs", dirs_exist_ok=True)
                self._disk.unmount()

    @property
    def _run_dir(self) -> Path:
        mounted = self._disk is not None and self._disk.mounted
        return self._folder / ("disk" if mounted else "runs")

    def _one_run(self) -> None:
        self.runs += 1
        self._idle = 0
        self._run = self._run_dir / f"run_{self.runs}"
        self._base = 0
        self._start_number = 0
        self._failures = 0
        self._waiting: list[Result] = []
        """Whose end is not known yet."""
        self._skipped: list[Path] = []
        self._lasting: Fault | None = None
        while not self._one_start():
            pass
        reference = self._references.of(self.scenario)
        found = checks.of_complete_run(self._run, reference, self.scenario.steps, not self.scenario.moving)
        self._finish(self._waiting, time.monotonic())
        self.violations += [f"run {self.runs}: {violation}" for violation in found]
        if self.runs > 1 and not found:  # small disks hold one run
            shutil.rmtree(self._run)

    # One start after another

    def _one_start(self) -> bool:
        """Whether the run is complete now."""
        self._start_number += 1
        self.starts += 1
        faults: list[Fault] = [] if self._lasting else self._next_faults()
        unreadable = self._lasting.rank if self._lasting else None
        start = Start(
            self._start_number, self.scenario, self._layout, faults, self._base, self._disk, unreadable
        )
        logs = self._folder / "logs" / f"run_{self.runs}_start_{self._start_number:03d}"
        options = arguments(self.scenario, self._layout, self._references.data, self._run_dir, self._run.name)
        try:
            start.run(options, self._references.data, logs, self._fresh, self._saw_step)
        finally:
            start.close()
            self.compile_locks += remove_compile_locks()
        return self._look_at(start)

    def _saw_step(self, step: int, seconds: float) -> None:
        for result in self._waiting:
            if result.recovered_s is None and step > self._base:
                result.recovered_s = seconds - result.struck_s

    def _look_at(self, start: Start) -> bool:
        now_s, number = time.monotonic(), self._start_number
        resumed = start.resumed_step()
        found = judge.of_start(start)
        if resumed is not None and resumed != self._base:
            found.append(f"went on from step {resumed} and not from {self._base}, the newest that is whole")
        found += self._said_skipped(start)
        unsound = [
            f"{folder.name}: {problem}"
            for folder in checks.checkpoint_folders(self._run)
            if folder not in self._skipped and (problem := checks.unsound(folder))
        ]
        found += [f"has the name of a checkpoint but is none: {line}" for line in unsound]
        if start.trained:
            self._skipped = []
        newest = self._newest()
        found += judge.of_progress(start, newest, self._failures)
        self._failures = start.failed_saves() + self._failures if newest == self._base else 0
        known = [result for result in self._waiting if start.trained and start.unreadable is None]
        self._waiting = [result for result in self._waiting if result not in known]
        self._finish(known, now_s)
        struck = list(start.struck.values())
        self._take_note_of_nan(start, struck)
        complete = set(start.ranks.codes.values()) == {0}
        self._idle = 0 if struck or newest > self._base or start.unreadable is not None else self._idle + 1
        if self._idle > 4 and not complete:
            raise RuntimeError(
                f"run {self.runs} ended {self._idle} times without a fault or progress: {found}"
            )
        for result in struck:
            result.folder = str(self._run)
            ended = result.fault.kind in ENDING or (result.fault.kind == "disk-full" and result is struck[-1])
            result.steps_lost = 0 if complete or not ended else max(0, start.reached - newest)
            if ended and not complete:
                result.recovered_s = None  # not by the steps that came between the fault and the end
        owner = struck[-1] if struck else None
        if found and owner is not None:
            owner.violations += found
        elif found:
            place = known[-1] if known else None
            told = [f"start {number} of run {self.runs}: {violation}" for violation in found]
            if place is not None:
                self.violations += [f"after fault {place.fault.number}, {line}" for line in told]
            else:
                self.violations += told
        if self._lasting and not start.struck:
            self._lasting = None
        self._waiting += struck
        lasting = [result.fault for result in struck if result.fault.kind == "read-error-lasting"]
        self._lasting = lasting[0] if lasting else self._lasting if start.unreadable is None else None
        self._put_back([fault for fault in start.faults.values() if fault.number not in start.struck])
        self._base = newest
        return complete

    def _newest(self) -> int:
        sound = [folder for folder in checks.checkpoint_folders(self._run) if not checks.unsound(folder)]
        return checks.step_of(sound[-1]) if sound else 0

    def _take_note_of_nan(self, start: Start, struck: list[Result]) -> None:
        for step in start.nan_steps:
            if self._nan and step not in self._nan_seen:
                self._nan_seen.add(step)
                result = Result(
                    self._nan.pop(0), self.scenario.number, "", self._start_number, time.monotonic(), step
                )
                result.codes = [start.ranks.codes[rank] for rank in sorted(start.ranks.codes)]
                result.recovered_s = 0.0 if start.reached > step else None
                struck.append(result)

    def _said_skipped(self, start: Start) -> list[str]:
        found = []
        for folder in self._skipped if start.trained else ():
            out = start.ranks.text("out")[0]
            if f"{folder.name} was skipped: " not in out:
                found.append(f"{folder.name} was damaged and the log does not say that it was skipped")
            if not list(folder.parent.glob(f"damaged_{folder.name}*/DAMAGED.txt")):
                found.append(f"{folder.name} was damaged and has not been set aside")
        return found

    def _finish(self, results: list[Result], now_s: float) -> None:
        for result in results:
            if result.recovered_s is None:
                result.recovered_s = now_s - result.struck_s
            self._say(result)

    def _put_back(self, faults: list[Fault]) -> None:
        for fault in faults:
            if fault.number == 0:
                continue
            self._tries[fault.number] = self._tries.get(fault.number, 0) + 1
            if self._tries[fault.number] > 6:
                self.violations.append(f"fault {fault.number} ({fault}) did not strike in 6 starts")
            else:  # sooner next time, as another fault or the end of the run came first
                self._queue.insert(0, dataclasses.replace(fault, after=1))

    # What comes next

    def _next_faults(self) -> list[Fault]:
        """Strike what strikes between starts, and choose what strikes the next start."""
        while self._queue and self._queue[0].kind in (*BETWEEN, "kill-in-load"):
            fault = self._queue[0]
            if fault.kind == "kill-in-load" and self._base:
                break
            if fault.kind in BETWEEN and self._strike_between(fault):
                self._queue.pop(0)
                continue
            later = [i for i, f in enumerate(self._queue) if f.kind in ENDING and f.kind != "kill-in-load"]
            if later:
                self._queue.insert(later[0], self._queue.pop(0))
            else:  # something has to end the run first, and does not count
                self._queue.insert(0, Fault(0, "kill-all", after=8, all_ranks=True))
        chosen: list[Fault] = []
        while self._queue and self._queue[0].kind not in BETWEEN:
            if chosen and self._queue[0].kind == "kill-in-load":
                break
            chosen.append(self._queue.pop(0))
            alone = self._tries.get(chosen[-1].number, 0) > 1
            if chosen[-1].kind in ENDING or chosen[-1].kind == "disk-full" or alone or len(chosen) == 4:
                break
        return chosen

    def _strike_between(self, fault: Fault) -> bool:
        """Whether it could be done with what is there."""
        if self._start_number == 1:
            return False
        if fault.kind == "layout":
            self._moves += 1
            self._layout = MOVES[self._moves % len(MOVES)]
            self._wait_for(fault)
            return True
        sound = [folder for folder in checks.checkpoint_folders(self._run) if not checks.unsound(folder)]
        if fault.kind == "all-damaged":
            return bool(sound) and not self._skipped and self._refused(fault)
        if len(sound) < 2:
            return False
        before = self._base
        skipped = damage(self._run / "checkpoints", sound[-1], fault.variant, fault.rank)
        if skipped is not None:
            self._skipped.append(skipped)
        self._base = self._newest()
        self._wait_for(fault).steps_lost = before - self._base
        return True

    def _wait_for(self, fault: Fault) -> Result:
        result = Result(
            fault, self.scenario.number, str(self._run), self._start_number, time.monotonic(), self._base
        )
        self._waiting.append(result)
        return result

    def _refused(self, fault: Fault) -> bool:
        """With every checkpoint damaged, a start has to refuse, and to change nothing."""
        result = self._wait_for(fault)
        copy = self._folder / "copy_of_checkpoints"
        shutil.copytree(self._run / "checkpoints", copy)
        folders = checks.checkpoint_folders(self._run)
        for number, folder in enumerate(folders):
            damage(
                self._run / "checkpoints",
                folder,
                ("truncated", "missing", "manifest-empty")[number % 3],
                fault.rank,
            )
        start = Start(self._start_number, self.scenario, self._layout, [], self._base, None)
        logs = self._folder / "logs" / f"run_{self.runs}_refused_{fault.number}"
        options = arguments(self.scenario, self._layout, self._references.data, self._run_dir, self._run.name)
        start.run(options, self._references.data, logs, self._fresh, lambda step, seconds: None)
        self.starts += 1
        result.codes = [start.ranks.codes[rank] for rank in range(self._layout.processes)]
        said = "".join(start.ranks.text("err"))
        if (
            set(result.codes) != {EXIT_REFUSED}
            or said.count("error: ") != 1
            or "holds no checkpoint that is intact" not in said
        ):
            result.violations.append(
                f"with all checkpoints damaged: exit codes {result.codes}, {said[:300]!r}"
            )
        if checks.checkpoint_folders(self._run) != folders:
            result.violations.append("with all checkpoints damaged, something was renamed or removed")
        shutil.rmtree(self._run / "checkpoints")
        shutil.copytree(copy, self._run / "checkpoints")
        shutil.rmtree(copy)
        return True
