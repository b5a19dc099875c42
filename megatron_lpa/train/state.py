"""What callbacks see of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lpa.config import RunConfig
from megatron_lpa.data.gpt_dataset import Splits
from megatron_lpa.engine.build import Engine
from megatron_lpa.engine.manifest import Progress, SampleOrder

Record = dict[str, Any]
"""One line of ``metrics.jsonl``; ``kind`` is train, valid, test or event."""


@dataclass
class Run:
    """A run in progress.

    Args:
        config: the resolved config.
        folder: the run folder.
        engine: model and optimizer.
        splits: the data.
        steps: optimizer steps of the whole run.
        progress: how far it has come.
        saved_step: step of the newest checkpoint; -1 when there is none.
        problem: what went wrong on this rank alone. A rank that raised by itself would leave the others
            waiting in a collective; the loop makes all ranks raise at the next agreement.
    """

    config: RunConfig
    folder: Path
    engine: Engine
    splits: Splits
    steps: int
    progress: Progress = Progress()  # noqa: RUF009 - frozen
    saved_step: int = -1
    problem: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs."""
        return self.engine.groups.rank == 0

    @property
    def order(self) -> SampleOrder:
        """What the order of training samples depends on."""
        return SampleOrder(self.config.train.seed, self.splits.train.num_samples)

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"
