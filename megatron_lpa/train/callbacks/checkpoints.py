"""Checkpoints at intervals, at the end, and when a signal asks to stop."""

from __future__ import annotations

from megatron_lpa.engine.checkpoint import save_checkpoint
from megatron_lpa.train.callbacks.base import Callback, StepReport
from megatron_lpa.train.callbacks.metrics import Metrics
from megatron_lpa.train.state import Run


class Checkpoints(Callback):
    """Writes a checkpoint unless the newest one is of this very step."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def after_step(self, run: Run, report: StepReport) -> None:
        """Save at the interval."""
        interval = run.config.train.checkpoint_interval
        if interval and run.progress.step % interval == 0:
            self._save(run)

    def on_finish(self, run: Run, signum: int) -> None:
        """Save whatever has not been saved."""
        self._save(run)

    def _save(self, run: Run) -> None:
        if run.saved_step == run.progress.step:
            return
        keep = run.config.train.keep_checkpoints
        path = save_checkpoint(run.engine, run.checkpoints, run.progress, keep, run.order)
        run.saved_step = run.progress.step
        self.metrics.emit(run, {"kind": "event", "step": run.progress.step, "message": f"checkpoint {path}"})
