"""Next-token cross-entropy over logits that are split over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_lpa.parallel.collectives import all_reduce_no_grad
from megatron_lpa.parallel.groups import ParallelGroups


def mask_padded_ids(logits: torch.Tensor, vocab_size: int, first_id: int) -> torch.Tensor:
    """Set logits of ids at or above ``vocab_size`` to -inf: padded ids have probability zero.

    Args:
        logits: (..., V/T), ids ``first_id`` onwards.
        vocab_size: number of real ids.
        first_id: id of column 0.
    """
    real = min(max(vocab_size - first_id, 0), logits.shape[-1])
    if real == logits.shape[-1]:
        return logits
    padded = torch.arange(logits.shape[-1], device=logits.device) >= real
    return logits.masked_fill(padded, float("-inf"))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token loss; the softmax is kept for backward in fp32 (fp64 for fp64 logits)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
        ctx.dtype = logits.dtype
        scores = logits.double() if logits.dtype == torch.float64 else logits.float()
        largest = all_reduce_no_grad(scores.amax(dim=-1), groups, dist.ReduceOp.MAX)
        scores = scores - largest.unsqueeze(-1)
        width = scores.shape[-1]
        local = labels - groups.tp_rank * width
        elsewhere = (local < 0) | (local >= width)
        local = local.masked_fill(elsewhere, 0)
        own_target = scores.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = scores.exp_()
        # One all-reduce carries both sums.
        sums = torch.stack((exponentials.sum(dim=-1), own_target))
        total, target = all_reduce_no_grad(sums, groups, dist.ReduceOp.SUM)
        softmax = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(softmax, local, elsewhere)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        softmax, local, elsewhere = ctx.saved_tensors
        gradient = softmax  # ours alone, and backward runs once: no second tensor of this size
        own = (~elsewhere).to(gradient.dtype).neg().unsqueeze(-1)
        gradient.scatter_add_(-1, local.unsqueeze(-1), own)
        gradient.mul_(grads[0].unsqueeze(-1))
        return gradient.to(ctx.dtype), None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, groups: ParallelGroups, vocab_size: int
) -> torch.Tensor:
    """``-log softmax(logits)[label]`` per token, without gathering the logits.

    Args:
        logits: (B, S, V/T), this rank's ids.
        labels: (B, S) int64, below ``vocab_size``.
        groups: process groups.
        vocab_size: number of real ids; padded ids above take no part.

    Returns:
        (B, S) fp32 (fp64 for fp64 logits), equal on all ranks of the tensor-parallel group.
    """
    logits = mask_padded_ids(logits, vocab_size, groups.tp_rank * logits.shape[-1])
    return _VocabParallelCrossEntropy.apply(logits, labels, groups)
