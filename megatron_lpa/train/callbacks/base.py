"""What a callback may hook into. All ranks run the same callbacks in the same order."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lpa.engine.build import StepResult
from megatron_lpa.train.state import Record, Run


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step.

    Args:
        result: loss and gradient norm.
        lr: learning rate used.
        step_s: wall time of the step, data included, in seconds.
        data_wait_s: part of it spent reading data.
    """

    result: StepResult
    lr: float
    step_s: float
    data_wait_s: float


class Callback:
    """Does nothing; override what is needed. Collectives are allowed in every hook but ``close``."""

    def on_start(self, run: Run) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """After each optimizer step; ``run.progress`` already counts it."""

    def on_finish(self, run: Run) -> None:
        """After the last step, or, with ``run.stopped_by`` above 0, after a signal."""

    def close(self, run: Run) -> None:
        """Last of all, also after an error; no collectives here."""


class Sink:
    """Somewhere records go, on rank 0.

    ``required`` sinks end the run when they cannot be written to; the others are switched off with a warning.
    """

    required = False

    def open(self, run: Run) -> None:
        """Before the first record."""

    def write(self, record: Record) -> None:
        """One record of ``metrics.jsonl``."""

    def close(self) -> None:
        """After the last record."""
