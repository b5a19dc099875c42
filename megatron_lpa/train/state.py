"""What callbacks see of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_lpa.checkpoint.progress import Progress, SampleOrder
from megatron_lpa.checkpoint.resume import Resumed
from megatron_lpa.config import RunConfig
from megatron_lpa.data.splits import Splits
from megatron_lpa.engine.stepping import Engine
from megatron_lpa.parallel.agreement import largest_of_all
from megatron_lpa.run_folder import CHECKPOINTS
from megatron_lpa.train.run_lock import RunLock
from megatron_lpa.train.stopping import Stopping
from megatron_lpa.train.watchdog import Watchdog


@dataclass
class Run:
    """A run in progress. Of its fields only ``progress`` changes, and only the loop changes it.

    Args:
        config: the resolved config.
        folder: the run folder.
        engine: model and optimizer.
        splits: the data.
        order: what the order of training samples depends on.
        steps: optimizer steps of the whole run.
        stopping: whether to go on: signals, and problems of this rank.
        progress: how far it has come.
        lock: that of the run folder, on rank 0.
        resumed: what this start goes on from; None when it begins anew.
        changes: settings that are not those of the checkpoint, in words.
        watchdog: what ends the run when it hangs; one that was not started watches nothing.
    """

    config: RunConfig
    folder: Path
    engine: Engine
    splits: Splits
    order: SampleOrder
    steps: int
    stopping: Stopping
    progress: Progress = Progress()  # noqa: RUF009 - frozen
    lock: RunLock | None = None
    resumed: Resumed | None = None
    changes: tuple[str, ...] = ()
    watchdog: Watchdog = field(default_factory=Watchdog)

    def enter(self, stage: str) -> None:
        """Tell the watchdog what comes next, in words that follow "rank 3 is"."""
        self.watchdog.enter(stage, self.progress.step)

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs."""
        return self.engine.groups.rank == 0

    def has_lost_folder(self) -> bool:
        """Whether nothing may be written any more; then it is the problem on rank 0. Every rank calls it."""
        if self.lock is not None:
            self.stopping.report(self.lock.lost())
        return bool(largest_of_all(self.lock is not None and not self.lock.still_held(), self.engine.groups))

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / CHECKPOINTS
