"""Validation at intervals and the final test."""

from __future__ import annotations

from megatron_lpa.data.samples import Samples
from megatron_lpa.train.callbacks.base import Callback, StepReport
from megatron_lpa.train.callbacks.metrics import Metrics
from megatron_lpa.train.evaluation import evaluate_split
from megatron_lpa.train.state import Run


class Evaluation(Callback):
    """Evaluates the validation split at intervals, and the whole test split after the last step."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def after_step(self, run: Run, report: StepReport) -> None:
        """Validate at the interval and after the last step."""
        train = run.config.train
        due = train.eval_interval and (
            run.progress.step % train.eval_interval == 0 or run.progress.step == run.steps
        )
        if due and run.splits.valid is not None:
            limit = train.eval_batches * train.global_batch_size if train.eval_batches else None
            self._evaluate(run, run.splits.valid, "valid", limit)

    def on_finish(self, run: Run) -> None:
        """Test a complete run."""
        if not run.stopped_by and run.splits.test is not None:
            self._evaluate(run, run.splits.test, "test", None)

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
