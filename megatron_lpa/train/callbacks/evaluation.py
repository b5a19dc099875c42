"""Validation at intervals and the final test."""

from __future__ import annotations

from megatron_lpa.config import TrainConfig
from megatron_lpa.data.samples import Samples
from megatron_lpa.train.callbacks.callback import Callback, StepReport
from megatron_lpa.train.callbacks.metrics import Metrics
from megatron_lpa.train.evaluation import evaluate_split
from megatron_lpa.train.state import Run


def is_due(train: TrainConfig, step: int, steps: int) -> bool:
    """Whether a run of ``steps`` steps validates after ``step`` of them."""
    return bool(train.eval_interval and step and (step % train.eval_interval == 0 or step == steps))


class Evaluation(Callback):
    """Evaluates the validation split at intervals, and the whole test split after the last step.

    What a stop has cut short is made up by the next start, before its first step.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def on_start(self, run: Run) -> None:
        """Make up the validation that was due when the run was stopped."""
        if is_due(run.config.train, run.progress.step, run.steps) and not self.metrics.has_record(
            run, "valid"
        ):
            self._validate(run)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Validate at the interval and after the last step."""
        if is_due(run.config.train, run.progress.step, run.steps):
            self._validate(run)

    def on_finish(self, run: Run) -> None:
        """Test a complete run, unless an earlier start has done so."""
        if run.stopped_by or run.splits.test is None or self.metrics.has_record(run, "test"):
            return
        self._evaluate(run, run.splits.test, "test", None)

    def _validate(self, run: Run) -> None:
        train = run.config.train
        if run.splits.valid is not None:
            limit = train.eval_batches * train.global_batch_size if train.eval_batches else None
            self._evaluate(run, run.splits.valid, "valid", limit)

    def _evaluate(self, run: Run, split: Samples, kind: str, max_samples: int | None) -> None:
        result = evaluate_split(run, split, max_samples)
        if result is None:  # asked to stop: the loop does so next
            return
        record = {
            "kind": kind,
            "step": run.progress.step,
            "tokens": run.progress.consumed_tokens,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "tokens_evaluated": result.tokens,
        }
        self.metrics.emit(run, record)
