"""A scenario from its first start to its last: strikes, starts again, and compares."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from fault_injection import checks, judge, refusals
from fault_injection.disk import SmallDisk, damage
from fault_injection.fault_plan import MOVES, Fault, Layout, Scenario
from fault_injection.kinds import BEFORE_TRAINING, BETWEEN, ENDING, OF_CHECKPOINT
from fault_injection.launches import remove_compile_locks
from fault_injection.one_start import Result, Start
from fault_injection.planting import Planted
from fault_injection.runs import References, arguments
from megatron_lpa.run_folder import CHECKPOINTS, DAMAGE_NOTE, DAMAGED, MANIFEST

PIPED_OPTIONS = ("config", "data-manifest")
"""Pipes that the command is given; others lie in the run folder."""

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
        self._set_aside = 0
        """Checkpoints that were damaged and have to have been set aside by now."""
        self._lasting: Fault | None = None
        self._planted: Planted | None = None
        self._planted_result: Result | None = None
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
            self._start_number,
            self.scenario,
            self._layout,
            faults,
            self._base,
            self._disk,
            unreadable,
            refusable=self._planted is not None,
        )
        logs = self._folder / "logs" / f"run_{self.runs}_start_{self._start_number:03d}"
        options = self._arguments(self._layout, {fault.kind for fault in faults})
        began_s = time.monotonic()
        try:
            start.run(options, self._references.data, logs, self._fresh, self._saw_step)
        finally:
            start.close()
            self.compile_locks += remove_compile_locks()
        if self._planted is not None and self._was_refused(start, time.monotonic() - began_s):
            return False
        return self._look_at(start)

    def _arguments(self, layout: Layout, kinds: set[str] | None = None) -> list[str]:
        return arguments(
            self.scenario, layout, self._references.data, self._run_dir, self._run.name, kinds or ()
        )

    def _was_refused(self, start: Start, seconds: float) -> bool:
        """Look at what was planted, take it away, and tell whether the start has to come again without it."""
        planted, result = self._planted, self._planted_result
        assert planted is not None and result is not None
        self._planted = None
        if changed := planted.changed_outside():
            result.violations.append(f"files outside the run folder have changed: {', '.join(changed)}")
        # A run that is complete trains no step either.
        refused = not start.trained and set(start.ranks.codes.values()) != {0}
        if refused:
            codes, errors = [code for _, code in sorted(start.ranks.codes.items())], start.ranks.text("err")
            result.codes = codes
            result.violations += planted.of_refused_start(codes, errors, seconds, refusals.LIMIT_S)
            self._queue[0:0] = [fault for fault in start.faults.values() if fault.number]
            self._skipped = [folder for folder in self._skipped if folder not in planted.path.parents]
        else:
            result.violations += planted.of_start()
        planted.remove()
        for path in self._run.glob(f"{CHECKPOINTS}/{DAMAGED}*/**/*"):
            if path.is_fifo():
                path.unlink()
        if refused:
            self._base = self._newest()
            result.steps_lost = 0
        return refused

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
            self._set_aside += len(self._skipped)
            self._skipped = []
            found += self._of_set_aside()
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
        if self._idle > 8 and not complete:
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

    def _of_set_aside(self) -> list[str]:
        number = len(list(self._run.glob(f"{CHECKPOINTS}/{DAMAGED}*")))
        if number == self._set_aside:
            return []
        expected, self._set_aside = self._set_aside, number
        return [f"{number} checkpoints have been set aside, where {expected} were damaged"]

    def _sound(self) -> list[Path]:
        folders = checks.checkpoint_folders(self._run)
        return [folder for folder in folders if folder not in self._skipped and not checks.unsound(folder)]

    def _newest(self) -> int:
        sound = self._sound()
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
            if not list(folder.parent.glob(f"{DAMAGED}{folder.name}*/{DAMAGE_NOTE}")):
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
                amount = fault.amount / 2 if fault.kind == "kill-random" else fault.amount
                self._queue.insert(0, dataclasses.replace(fault, after=1, amount=amount))

    # What comes next

    def _next_faults(self) -> list[Fault]:
        """Strike what strikes between starts, and choose what strikes the next start."""
        while self._queue and self._planted is None and _is_between(self._queue[0]):
            fault = self._queue[0]
            if fault.kind not in BETWEEN and self._base:
                break
            if fault.kind in BETWEEN and self._strike_between(fault):
                self._queue.pop(0)
                continue
            later = [i for i, f in enumerate(self._queue) if f.kind in ENDING and not _is_between(f)]
            if later:
                self._queue.insert(later[0], self._queue.pop(0))
            else:  # something has to end the run first, and does not count
                self._queue.insert(0, Fault(0, "kill-all", after=8, all_ranks=True))
        if self._planted is not None:
            late = [f for f in self._queue if f.kind in ENDING and f.kind not in BEFORE_TRAINING]
            if late:
                self._queue.remove(late[0])
            return [late[0] if late else Fault(0, "kill-all", after=4, all_ranks=True)]
        chosen: list[Fault] = []
        while self._queue and self._queue[0].kind not in BETWEEN:
            if chosen and _is_between(self._queue[0]):
                break
            chosen.append(self._queue.pop(0))
            alone = self._tries.get(chosen[-1].number, 0) > 1
            if chosen[-1].kind in ENDING or chosen[-1].kind == "disk-full" or alone or len(chosen) == 6:
                break
        return chosen

    def _strike_between(self, fault: Fault) -> bool:
        """Whether it could be done with what is there."""
        in_checkpoint = fault.kind == "pipe" and fault.variant in OF_CHECKPOINT
        if fault.kind == "rank-mismatch" or (fault.kind == "pipe" and fault.variant in PIPED_OPTIONS):
            return self._try_refused(fault)
        if fault.kind in ("link", "pipe") and not in_checkpoint:
            sort, _, name = (
                f"pipe {fault.variant}".partition(" ")
                if fault.kind == "pipe"
                else fault.variant.partition(" ")
            )
            self._plant(fault, sort, name)
            return True
        if self._start_number == 1:
            return False
        if fault.kind == "layout":
            self._moves += 1
            self._layout = MOVES[self._moves % len(MOVES)]
            self._wait_for(fault)
            return True
        sound = self._sound()
        if fault.kind == "all-damaged":
            return bool(sound) and not self._skipped and self._try_refused(fault)
        if len(sound) < 2:
            return False
        before = self._base
        skipped: Path | None = sound[-1]
        if in_checkpoint:
            file = MANIFEST if fault.variant == "manifest" else f"{fault.variant}/*.safetensors"
            victim = sorted(sound[-1].glob(file))[0]
            self._plant(fault, "pipe", str(victim.relative_to(self._run)))
        else:
            skipped = damage(self._run / CHECKPOINTS, sound[-1], fault.variant, fault.rank)
            self._wait_for(fault)
        if skipped is not None:
            self._skipped.append(skipped)
        self._base = self._newest()
        self._waiting[-1].steps_lost = before - self._base
        return True

    def _plant(self, fault: Fault, sort: str, name: str) -> None:
        self._planted = Planted(self._run, sort, name, self._run_dir / f"aside_{fault.number}")
        self._planted_result = self._wait_for(fault)

    def _wait_for(self, fault: Fault) -> Result:
        result = Result(
            fault, self.scenario.number, str(self._run), self._start_number, time.monotonic(), self._base
        )
        self._waiting.append(result)
        return result

    def _try_refused(self, fault: Fault) -> bool:
        """A whole start that has to be refused."""
        result = self._wait_for(fault)
        layout = self._layout
        if fault.kind == "rank-mismatch" and layout.processes == 1:
            layout = MOVES[0]
        self.starts += 1
        refusals.RefusedStart(
            self._run, layout, self._arguments(layout), self._references.data, self._folder, self._fresh
        ).go(result, f"run_{self.runs}_refused_{fault.number}")
        return True


def _is_between(fault: Fault) -> bool:
    """Whether it strikes between two starts, or needs a checkpoint that is loaded by the next."""
    of_checkpoint = fault.kind.startswith("open-error") and fault.variant.startswith(OF_CHECKPOINT)
    return fault.kind in BETWEEN or fault.kind == "kill-in-load" or of_checkpoint
