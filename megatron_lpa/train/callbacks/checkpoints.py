"""Checkpoints at intervals, at the end, and when a signal asks to stop."""

from __future__ import annotations

import torch

from megatron_lpa.engine.checkpoint import save_checkpoint
from megatron_lpa.train.callbacks.base import Callback, StepReport
from megatron_lpa.train.callbacks.metrics import Metrics, check_finite
from megatron_lpa.train.state import Run


class Checkpoints(Callback):
    """Writes a checkpoint unless the newest one is of this very step."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._losses: torch.Tensor | None = None

    def after_step(self, run: Run, report: StepReport) -> None:
        """Save at the interval.

        Raises:
            UserError: on all ranks, when a loss since the last checkpoint is not finite. Nothing is saved, so
                that a diverged model never takes the place of a good checkpoint.
        """
        loss = report.result.loss
        self._losses = loss if self._losses is None else self._losses + loss  # one bad loss spoils the sum
        interval = run.config.train.checkpoint_interval
        if interval and run.progress.step % interval == 0:
            self._save(run)

    def on_finish(self, run: Run) -> None:
        """Save whatever has not been saved."""
        self._save(run)

    def _save(self, run: Run) -> None:
        if run.saved_step == run.progress.step:
            return
        if self._losses is not None:
            check_finite(float(run.engine.mean_over_replicas(self._losses)), run)
            self._losses = None
        keep = run.config.train.keep_checkpoints
        path = save_checkpoint(run.engine, run.checkpoints, run.progress, keep, run.order)
        run.saved_step = run.progress.step
        self.metrics.emit(run, {"kind": "event", "step": run.progress.step, "message": f"checkpoint {path}"})
