"""One start of a run with the faults that strike it, from the first process to the end of the last."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_injection.disk import SmallDisk
from fault_injection.fault_plan import INTERVAL, Fault, Layout, Scenario
from fault_injection.kinds import ENDING, OF_CHECKPOINT
from fault_injection.launches import GRACE_S, Event, Ranks
from fault_injection.runs import START_LIMIT_S, nan_spec
from megatron_lpa.run_folder import CHECKPOINTS, STEP, checkpoint_name

LONGEST_S = 150.0
"""A start takes three seconds; one that takes so long hangs."""

LONGEST_HANG_S = START_LIMIT_S + 20.0
"""From a start on: the limit, the time for last words (15 s), and a few seconds before and behind them."""

STARTING_GRACE_S = 3.0
"""Processes that have not met yet wait for each other for half an hour; ended as a launcher does."""


@dataclass
class Result:
    """What became of a fault.

    Args:
        fault: which.
        scenario: number of the run's scenario.
        folder: of the run.
        start: number of the start that it struck.
        struck_s: when, on the monotonic clock.
        step: optimizer steps done then.
        codes: exit codes of the start that it struck, by rank.
        steps_lost: done and to be done again.
        recovered_s: seconds from the fault to the first step behind it, or after the next start; of a start
            that had to be refused, the seconds that it took.
        violations: of promises, in words.
    """

    fault: Fault
    scenario: int
    folder: str
    start: int
    struck_s: float
    step: int
    codes: list[int] = field(default_factory=list)
    steps_lost: int = 0
    recovered_s: float | None = None
    violations: list[str] = field(default_factory=list)


class Start:
    """One start.

    Args:
        number: of the start within the run.
        scenario: of the run.
        layout: of this start.
        faults: that are to strike, in their order.
        base: step of the checkpoint that the run has to go on from; 0 without one.
        disk: that ``disk-full`` fills.
        unreadable: data cannot be read from the first step on, by this rank.
        refusable: something lies in the run folder for which a start may be refused, at once.
    """

    def __init__(
        self,
        number: int,
        scenario: Scenario,
        layout: Layout,
        faults: list[Fault],
        base: int,
        disk: SmallDisk | None,
        unreadable: int | None = None,
        refusable: bool = False,
    ) -> None:
        self.number, self.scenario, self.layout, self.base = number, scenario, layout, base
        self.faults = {fault.number: fault for fault in faults}
        self.reached = base
        """The most optimizer steps that any process has told of."""
        self.at: dict[int, int] = {}
        """The step that each process has told of last: less than ``reached`` after going back."""
        self.backs: dict[int, int] = {}
        """How often each process has told of a step again."""
        self.backs_before: dict[int, int] = {}
        """How often the process that a fault struck had done so, by the fault's number."""
        self.trained = False
        self.hung = False
        self.struck: dict[int, Result] = {}
        self.nan_steps: list[int] = []
        self.killed: set[int] = set()
        self.ranks: Ranks
        self.folder = Path()
        """For what the processes print."""
        self.refusable = refusable
        self._disk, self.unreadable = disk, unreadable
        self._full_until = -1
        self._continue: dict[int, float] = {}
        self._random_s: dict[int, float] = {}

    def specs(self) -> list[dict[str, Any]]:
        """For each rank, what ``rank.Places`` takes."""
        specs: list[dict[str, Any]] = [
            {**nan_spec(self.scenario, rank), "holds": []} for rank in range(self.layout.processes)
        ]
        if self.unreadable is not None:
            specs[self._target(self.unreadable)]["unreadable"] = (0, 0)
        for fault in self.faults.values():
            spec, step = specs[self._target(fault.rank)], self._step(fault)
            if fault.kind == "kill-in-save":
                spec["holds"].append(
                    [fault.number, fault.site, min(self.base + fault.after, self.scenario.steps)]
                )
            elif fault.kind == "kill-in-load":
                spec["holds"].append([fault.number, "load", 0])
            elif fault.kind.startswith("read-error"):
                spec["unreadable"] = (step, 1 if fault.kind == "read-error" else 0)
            elif fault.kind == "clock":
                spec["clock"] = (step, fault.amount)
            elif fault.kind == "disk-full":
                self._hold_for_full_disk(fault, specs, step)
            elif fault.kind.startswith("open-error") or fault.kind == "hang-start":
                self._disk_error(fault, specs)
            elif fault.kind == "stop-between-bad":
                bad = specs[self.scenario.nan_batches[fault.batch]]
                bad["holds"].append([fault.number, "bad", fault.batch])
            elif fault.kind != "kill-random":
                spec["holds"].append([fault.number, "step", step])
            if fault.kind == "signal-twice":
                spec["holds"].append([fault.number, "before-state", step])
        return specs

    def _disk_error(self, fault: Fault, specs: list[dict[str, Any]]) -> None:
        """What ``interposed.Disk`` takes. Which process reads a checkpoint's file is for the run to decide:
        the first one."""
        what, _, error = (fault.variant or "idx").partition(" ")
        rule = {
            "id": fault.number, "path": path_pattern(what, self.base), "nth": fault.after,
            "times": int(fault.amount), "error": error,
        }  # fmt: skip
        if fault.kind == "hang-start":
            specs[self._target(fault.rank)]["holds"].append([fault.number, "disk", 0])
            rule |= {"hold": True, "nth": 1, "times": 1}
        if what in ("state", "weights"):
            rule["once"] = str(self.folder / f"fault_{fault.number}")
            for spec in specs:
                spec.setdefault("errors", []).append(rule)
        else:
            specs[self._target(fault.rank)].setdefault("errors", []).append(rule)

    def _hold_for_full_disk(self, fault: Fault, specs: list[dict[str, Any]], step: int) -> None:
        if self._disk is None or not self._disk.mounted:
            for spec in specs:
                spec["full"] = (step, step + 2 * INTERVAL)
        elif fault.variant == "mid-write":
            specs[0]["holds"].append([fault.number, "before-state", self.base + 1])
        else:
            specs[0]["holds"].append([fault.number, "step", step])

    def _target(self, rank: int) -> int:
        return rank % self.layout.processes

    def _step(self, fault: Fault) -> int:
        """When a fault strikes that holds a process at the beginning of a step."""
        step = self.base + fault.after
        if fault.kind == "signal-twice" and step % INTERVAL == 0:
            step += 1  # else the checkpoint exists already, and nothing is left to be interrupted
        return min(step, self.scenario.steps - 1)

    def run(self, arguments: list[str], cwd: Path, logs: Path, fresh: bool, on_step: Any) -> None:
        """Start, strike, and wait for the end.

        Args:
            arguments: of ``megatron_lpa.pretrain``.
            cwd: where the processes run.
            logs: for what they print.
            fresh: as ``Ranks``.
            on_step: called with a step and a time in seconds whenever a process tells of a step.
        """
        began = time.monotonic()
        self.folder = logs
        self.ranks = Ranks(arguments, self.specs(), cwd, logs, fresh)
        self._plan_random(began, "starting")
        try:
            while self.ranks.alive:
                for event in self.ranks.events(0.02):
                    self._handle(event, on_step)
                self._look_at_the_time(time.monotonic() - began > self._longest_s)
        finally:
            self.ranks.close()
            if self._disk is not None:
                self._disk.empty()
        for result in self.struck.values():
            result.codes = [self.ranks.codes[rank] for rank in range(self.layout.processes)]

    @property
    def _longest_s(self) -> float:
        hanging = any(result.fault.kind == "hang-start" for result in self.struck.values())
        return LONGEST_HANG_S if hanging or (self.refusable and not self.trained) else LONGEST_S

    def _plan_random(self, now_s: float, when: str) -> None:
        for fault in self.faults.values():
            if fault.kind == "kill-random" and fault.variant == when:
                self._random_s[fault.number] = now_s + fault.amount

    def _handle(self, event: Event, on_step: Any) -> None:
        content = event.content
        if content["event"] == "step":
            if not self.trained:
                self.trained = True
                self._plan_random(event.seconds, "training")
            self.reached = max(self.reached, content["step"])
            if content["step"] <= self.at.get(event.rank, -1):
                self.backs[event.rank] = self.backs.get(event.rank, 0) + 1
            self.at[event.rank] = content["step"]
            on_step(content["step"], event.seconds)
            for result in self.struck.values():
                if (
                    result.fault.kind not in ENDING
                    and result.recovered_s is None
                    and content["step"] > result.step
                ):
                    result.recovered_s = event.seconds - result.struck_s
            if self._disk is not None and 0 <= self._full_until <= content["step"]:
                self._disk.empty()
        elif content["event"] == "hold":
            if content["place"] not in ("load", "bad", "disk"):  # inside the save of a step that is done
                self.reached = max(self.reached, content["step"])
            self._strike(self.faults[content["id"]], event)
        elif content["event"] == "nan":
            self.nan_steps.append(content["step"])
        elif content["event"] == "open-error":
            self._note(self.faults[content["id"]])
        else:
            kind = {"unreadable": "read-error", "clock": "clock", "full": "disk-full"}[content["event"]]
            for fault in self.faults.values():
                if fault.kind.startswith(kind):
                    self._note(fault)

    def _note(self, fault: Fault) -> None:
        if fault.number not in self.struck:
            self.struck[fault.number] = Result(
                fault, self.scenario.number, "", self.number, time.monotonic(), self.reached
            )

    def _strike(self, fault: Fault, event: Event) -> None:
        rank, ranks = event.rank, self.ranks
        again = fault.number in self.struck
        if fault.kind in ("kill-one", "kill-in-save", "kill-in-load", "kill-all"):
            time.sleep(fault.amount)
            self._kill(fault, rank)
            return
        self._note(fault)
        self.backs_before[fault.number] = self.backs.get(rank, 0)
        if fault.kind == "hang-start":  # it goes on standing still
            return
        if fault.kind in ("signal", "stop-between-bad") or (fault.kind == "signal-twice" and not again):
            ranks.signal(rank, getattr(signal, fault.variant))
        elif fault.kind == "signal-twice":
            ranks.signal(rank, signal.SIGINT if fault.number % 2 else signal.SIGTERM)
        elif fault.kind == "pause":
            ranks.signal(rank, signal.SIGSTOP)
            self._continue[rank] = time.monotonic() + fault.amount
        elif fault.kind == "stop-for-ever":
            ranks.signal(rank, signal.SIGSTOP)
            self.killed.add(rank)
        elif fault.kind == "disk-full" and self._disk is not None:
            # Records of a few hundred bytes fit, a checkpoint of two hundred thousand does not.
            self._disk.fill(0 if fault.variant == "last-byte" else 60_000)
            self._full_until = event.content["step"] + 2 * INTERVAL
        ranks.go(rank)

    def _kill(self, fault: Fault, rank: int) -> None:
        self._note(fault)
        for victim in self.ranks.alive if fault.all_ranks else [rank]:
            self.ranks.signal(victim, signal.SIGKILL)
            self.killed.add(victim)

    def _look_at_the_time(self, too_long: bool) -> None:
        now_s = time.monotonic()
        for rank, until_s in list(self._continue.items()):
            if now_s >= until_s:
                del self._continue[rank]
                self.ranks.signal(rank, signal.SIGCONT)
        for number, at_s in list(self._random_s.items()):
            if now_s >= at_s:
                del self._random_s[number]
                fault = self.faults[number]
                self._kill(fault, self._target(fault.rank))
        kinds = {result.fault.kind for result in self.struck.values()}
        stopped = [r.fault for r in self.struck.values() if r.fault.kind == "stop-for-ever"]
        if stopped and self.ranks.alive == [self._target(stopped[0].rank)]:
            self.ranks.signal(self.ranks.alive[0], signal.SIGKILL)
        elif not stopped and "hang-start" not in kinds:
            self.ranks.end_survivors(GRACE_S if self.trained else STARTING_GRACE_S)
        if too_long:
            self.hung = True
            self.ranks.kill_all()

    def resumed_step(self) -> int | None:
        """The step that rank 0 says it goes on from; 0 from the beginning, None when it did not come that
        far."""
        found = re.search(r"^resuming from \S+ at step ([\d,]+)$", self.ranks.text("out")[0], re.MULTILINE)
        if found:
            return int(found[1].replace(",", ""))
        return 0 if self.trained else None

    def went_back_to(self) -> list[int]:
        """The steps of the checkpoints that the run went back to, one after another."""
        found = re.findall(rf"went back to {STEP}(\d+) because of", self.ranks.text("err")[0])
        return [int(step) for step in found]

    def failed_saves(self) -> int:
        """Checkpoints that could not be written."""
        return self.ranks.text("err")[0].count("the checkpoint could not be written")

    def close(self) -> None:
        """Kill what is left, after an error of the driver's own."""
        with contextlib.suppress(AttributeError):
            self.ranks.close()


def path_pattern(what: str, base: int) -> str:
    """Paths of what a disk does not give, as a regular expression.

    Args:
        what: of ``kinds.OPENED``.
        base: step of the newest checkpoint.
    """
    if what in OF_CHECKPOINT:
        folder = f"/{CHECKPOINTS}/{checkpoint_name(base)}/"
        return folder + (r"manifest\.json$" if what == "manifest" else f"{what}/")
    names = {"idx": "data.idx", "bin": "data.bin", "data-manifest": "data.json", "config": "model.yaml"}
    return "/" + re.escape(names[what]) + "$"
