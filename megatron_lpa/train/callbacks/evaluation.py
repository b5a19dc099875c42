"""Validation at intervals and the final test: the loss on a split, over all processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from megatron_lpa.checkpoint.resume import Resumed
from megatron_lpa.data.batches import evaluation_indices, load_batch
from megatron_lpa.data.samples import Samples
from megatron_lpa.errors import UserError
from megatron_lpa.records import perplexity
from megatron_lpa.train.callbacks.callback import Callback, StepReport
from megatron_lpa.train.callbacks.metrics import Metrics
from megatron_lpa.train.schedule import is_due
from megatron_lpa.train.state import Run


@dataclass(frozen=True)
class EvaluationResult:
    """Loss of a split.

    Args:
        step: optimizer steps that the model had done.
        loss: mean cross-entropy per token, in nats.
        tokens: tokens predicted.
    """

    step: int
    loss: float
    tokens: int


class Evaluation(Callback):
    """Evaluates the validation split at intervals, and the whole test split after the last step.

    What a stop has cut short is made up by the next start, before its first step.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._last: EvaluationResult | None = None

    def validation_loss(self, step: int) -> float | None:
        """Of validation after ``step`` steps, in nats, if it ran then, in this start, and was finite."""
        last = self._last
        return last.loss if last is not None and last.step == step and math.isfinite(last.loss) else None

    def on_start(self, run: Run) -> None:
        """Make up the validation that was due when the run was stopped."""
        self.every, step = run.config.train.eval_interval, run.progress.step
        if step and is_due(self.every, step, run.steps) and not self.metrics.has_record(run, "valid"):
            self._validate(run)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Validate at the interval and after the last step."""
        self._validate(run)

    def after_rollback(self, run: Run, resumed: Resumed) -> None:
        """Forget the last validation: the weights of its step are going to be others."""
        self._last = None

    def on_finish(self, run: Run) -> None:
        """Test a complete run, unless an earlier start has done so."""
        if run.stopping.stopped_by or run.splits.test is None or self.metrics.has_record(run, "test"):
            return
        self._record(run, "test", evaluate_split(run, run.splits.test))

    def _validate(self, run: Run) -> None:
        train = run.config.train
        if run.splits.valid is not None:
            limit = train.eval_batches * train.global_batch_size if train.eval_batches else None
            self._last = evaluate_split(run, run.splits.valid, limit)
            self._record(run, "valid", self._last)

    def _record(self, run: Run, kind: str, result: EvaluationResult | None) -> None:
        if result is None:  # asked to stop: the loop does so next
            return
        record = {
            "kind": kind,
            "step": result.step,
            "tokens": run.progress.consumed_tokens,
            "loss": result.loss,
            "perplexity": perplexity(result.loss),
            "tokens_evaluated": result.tokens,
        }
        self.metrics.emit(run, record)


def evaluate_split(run: Run, split: Samples, max_samples: int | None = None) -> EvaluationResult | None:
    """Evaluate samples in their plain order, each exactly once; every rank calls it.

    Returns:
        The loss; or None when any rank was asked to stop meanwhile.

    Raises:
        AgreedProblem: on all ranks, when any rank cannot read its data.
    """
    engine, config, groups = run.engine, run.config, run.engine.groups
    samples = split.num_samples if max_samples is None else min(max_samples, split.num_samples)
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for positions, weights in evaluation_indices(
        samples, config.train.micro_batch_size, groups.dp_rank, groups.dp_size
    ):
        run.enter("reading data to evaluate")
        batch: np.ndarray | None = None
        problem: Exception | None = None
        try:
            batch = load_batch(split, split.in_order(positions), config.model.vocab_size)
        except (UserError, OSError) as error:
            problem = error
        if not run.stopping.agree_to_go_on(problem):
            return None
        assert batch is not None
        run.enter("computing")
        losses = engine.losses(torch.from_numpy(batch)).double()
        weight = engine.to_device(torch.from_numpy(weights)).double().unsqueeze(-1)
        total += torch.stack(((losses * weight).sum(), weight.sum() * losses.shape[-1]))
    loss_sum, tokens = (float(value) for value in engine.sum_over_replicas(total))
    return EvaluationResult(run.progress.step, loss_sum / tokens, round(tokens))
