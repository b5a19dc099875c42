"""Checkpoints at intervals, at the end, and when a signal asks to stop."""

from __future__ import annotations

import sys

import torch

from megatron_lpa.engine.checkpoint import CheckpointNotWritten, save_checkpoint
from megatron_lpa.engine.store import Retention
from megatron_lpa.train.callbacks.base import Callback, Sink, StepReport
from megatron_lpa.train.callbacks.metrics import Metrics, check_finite
from megatron_lpa.train.state import Record, Run


class LastValidation(Sink):
    """Remembers the last validation loss on rank 0, for the manifest of a checkpoint of the same step."""

    def __init__(self) -> None:
        self._step, self._loss = -1, 0.0

    def write(self, record: Record) -> None:
        """Take note of validation records."""
        if record["kind"] == "valid":
            self._step, self._loss = record["step"], record["loss"]

    def loss_at(self, step: int) -> float | None:
        """The loss of validation after ``step`` steps, if it ran then."""
        return self._loss if self._step == step else None


class Checkpoints(Callback):
    """Writes a checkpoint unless the newest one is of this very step."""

    def __init__(self, metrics: Metrics, validation: LastValidation) -> None:
        self.metrics = metrics
        self._validation = validation
        self._losses: torch.Tensor | None = None

    def on_start(self, run: Run) -> None:
        """Record what was noticed while resuming."""
        for note in run.resume_notes:
            self._record(run, note)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Save at the interval.

        Raises:
            UserError: on all ranks, when a loss since the last checkpoint is not finite. Nothing is saved, so
                that a diverged model never takes the place of a good checkpoint. Or when the checkpoint cannot
                be written and ``train.on_checkpoint_failure`` is ``stop``.
        """
        loss = report.result.loss
        self._losses = loss if self._losses is None else self._losses + loss  # one bad loss spoils the sum
        train = run.config.train
        if not train.checkpoint_interval or run.progress.step % train.checkpoint_interval:
            return
        try:
            self._save(run)
        except CheckpointNotWritten as error:
            if train.on_checkpoint_failure == "stop" or run.progress.step == run.steps:
                raise
            warning = (
                f"step {run.progress.step}: {error}; training goes on and the next attempt is in "
                f"{train.checkpoint_interval} steps; what was trained since the last checkpoint would be lost "
                "(train.on_checkpoint_failure=stop ends the run instead)"
            )
            if run.is_main:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
            self._record(run, f"checkpoint failed: {warning}")

    def on_finish(self, run: Run) -> None:
        """Save whatever has not been saved."""
        self._save(run)

    def _save(self, run: Run) -> None:
        if run.saved_step == run.progress.step:
            return
        if self._losses is not None:
            check_finite(float(run.engine.mean_over_replicas(self._losses)), run)
            self._losses = None
        train, step = run.config.train, run.progress.step
        path = save_checkpoint(
            run.engine,
            run.checkpoints,
            run.progress,
            run.order,
            Retention(train.keep_checkpoints, train.keep_every, train.keep_best),
            self._validation.loss_at(step),
        )
        run.saved_step = step
        self._record(run, f"checkpoint {path}")

    def _record(self, run: Run, message: str) -> None:
        self.metrics.emit(run, {"kind": "event", "step": run.progress.step, "message": message})
