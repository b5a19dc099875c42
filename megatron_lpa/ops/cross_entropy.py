"""The parts of a cross-entropy that one rank computes by itself, over the columns that it holds.

As in ``ops/elementwise.py``: ``compiled`` reads the logits once and writes no fp32 copy of them. ``liger`` has no
function of this shape and is computed as ``compiled``.
"""

from __future__ import annotations

import torch

from megatron_lpa.ops import elementwise_math as formulas
from megatron_lpa.ops.elementwise import compiled, dynamic, resolve


def shard_statistics(
    scores: torch.Tensor, local: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest logit, sum of ``exp(logit - largest)`` and label's logit of each row; see ``elementwise_math``.

    Args:
        scores: (M, W), W at least 1.
        local: (M,) int64, the label's column or -1.
        backend: one of ``elementwise.BACKENDS``.

    Raises:
        UserError: as ``elementwise.resolve``.
    """
    if resolve(backend, scores) == "eager":
        return formulas.shard_statistics(scores, local)
    return compiled(formulas.shard_statistics)(dynamic(scores, 0), dynamic(local, 0))


def shard_gradient(
    scores: torch.Tensor,
    local: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    upstream: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """``(softmax - one-hot) * upstream``, (M, W) in the dtype of ``scores``; see ``elementwise_math``.

    Raises:
        UserError: as ``elementwise.resolve``.
    """
    if resolve(backend, scores) == "eager":
        gradient = formulas.wide(scores) - largest.unsqueeze(-1)
        gradient.exp_().div_(total.unsqueeze(-1))  # in place: this is the largest tensor of a step
        one = (local >= 0).to(gradient.dtype).neg().unsqueeze(-1)
        gradient.scatter_add_(-1, local.clamp(min=0).unsqueeze(-1), one)
        return gradient.mul_(upstream.unsqueeze(-1)).to(scores.dtype)
    tensors = (scores, local, largest, total, upstream)
    return compiled(formulas.shard_gradient)(*(dynamic(t, 0) for t in tensors))
