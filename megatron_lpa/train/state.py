"""What callbacks see of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lpa.checkpoint.progress import (
    AT_START,
    NOTHING_UNRECORDED,
    Decisions,
    Progress,
    SampleOrder,
    Unrecorded,
)
from megatron_lpa.checkpoint.resume import Resumed
from megatron_lpa.config import RunConfig
from megatron_lpa.data.splits import Splits
from megatron_lpa.engine.stepping import Engine
from megatron_lpa.errors import AgreedProblem
from megatron_lpa.parallel.agreement import gather_messages, largest_of_all, severity_of, worst_error
from megatron_lpa.run_folder import CHECKPOINTS
from megatron_lpa.train.run_lock import RunLock
from megatron_lpa.train.signals import StopRequest
from megatron_lpa.train.watchdog import Watchdog


@dataclass
class Run:
    """A run in progress.

    Args:
        config: the resolved config.
        folder: the run folder.
        engine: model and optimizer.
        splits: the data.
        order: what the order of training samples depends on.
        steps: optimizer steps of the whole run.
        progress: how far it has come.
        saved_step: step of the newest checkpoint; -1 when there is none.
        problem: what went wrong on this rank alone; it says whether another attempt may help. A rank that raised by itself would leave the others
            waiting in a collective; the loop makes all ranks raise at the next agreement.
        stop: whether this process was asked to stop.
        lock: that of the run folder, on rank 0.
        stopped_by: the signal that all ranks agreed to stop for; 0 while none came.
        resumed: what this start goes on from; None when it begins anew.
        resume_notes: what was noticed while resuming, such as a damaged checkpoint that was skipped.
        changes: settings that are not those of the checkpoint, in words; recorded with the first step that they count for.
        decisions: what decides whether the run goes back; as of ``progress``, like everything that a checkpoint holds.
        unrecorded: losses that the checkpoint had in no record, when the run came from one; what followed is in ``Metrics``.
        watchdog: what ends the run when it hangs; None watches nothing.
        waited_s: seconds that this process has waited for others before steps, since somebody set it to 0.
    """

    config: RunConfig
    folder: Path
    engine: Engine
    splits: Splits
    order: SampleOrder
    steps: int
    progress: Progress = Progress()  # noqa: RUF009 - frozen
    saved_step: int = -1
    problem: Exception | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    stopped_by: int = 0
    lock: RunLock | None = None
    resumed: Resumed | None = None
    resume_notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    decisions: Decisions = AT_START
    unrecorded: Unrecorded = NOTHING_UNRECORDED
    watchdog: Watchdog | None = None
    waited_s: float = 0.0

    def enter(self, stage: str) -> None:
        """Tell the watchdog what comes next, in words that follow "rank 3 is"."""
        if self.watchdog is not None:
            self.watchdog.enter(stage, self.progress.step)

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs."""
        return self.engine.groups.rank == 0

    def has_lost_folder(self) -> bool:
        """Whether nothing may be written any more; then it is the problem on rank 0. Every rank calls it."""
        if self.lock is not None:
            self.problem = self.problem or self.lock.lost()
        return bool(largest_of_all(self.lock is not None and not self.lock.still_held(), self.engine.groups))

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / CHECKPOINTS


GO_ON, STOP, FAIL = 0, 1000, 2000  # STOP carries the signal's number, FAIL outranks it


def agree_to_go_on(run: Run, problem: Exception | None) -> bool:
    """Whether all ranks can and want to go on: one small all-reduce on the CPU. Every rank calls it.

    Args:
        run: the run; ``stopped_by`` is set when any rank was asked to stop.
        problem: what keeps this rank from going on.

    Raises:
        AgreedProblem: on all ranks, when any rank has a problem.
    """
    wish = run.stop.signum()
    arrived = time.perf_counter()
    decision = largest_of_all(
        FAIL + severity_of(problem) if problem else STOP + wish if wish else GO_ON, run.engine.groups
    )
    run.waited_s += time.perf_counter() - arrived
    run.enter("computing")
    if decision >= FAIL:
        message = gather_messages(None if problem is None else str(problem), run.engine.groups)
        raise AgreedProblem(message, worst_error(decision - FAIL).exit_code)
    if decision >= STOP:
        run.stopped_by = decision - STOP
    return decision == GO_ON
