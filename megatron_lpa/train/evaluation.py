"""Loss of the model in training on a whole split, over all processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_lpa.data.batches import evaluation_indices, load_batch
from megatron_lpa.data.samples import Samples
from megatron_lpa.errors import UserError
from megatron_lpa.records import perplexity
from megatron_lpa.train.state import Run, agree_to_go_on


@dataclass(frozen=True)
class SplitLoss:
    """Loss of a split.

    Args:
        loss: mean cross-entropy per token, in nats.
        tokens: tokens predicted.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, per token."""
        return perplexity(self.loss)


def evaluate_split(run: Run, split: Samples, max_samples: int | None = None) -> SplitLoss | None:
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
        if not agree_to_go_on(run, problem):
            return None
        assert batch is not None
        losses = engine.losses(torch.from_numpy(batch)).double()
        weight = engine.to_device(torch.from_numpy(weights)).double().unsqueeze(-1)
        total += torch.stack(((losses * weight).sum(), weight.sum() * losses.shape[-1]))
    loss_sum, tokens = (float(value) for value in engine.sum_over_replicas(total))
    return SplitLoss(loss_sum / tokens, round(tokens))
