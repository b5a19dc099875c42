"""The parts of a cross-entropy that one rank computes by itself, over the columns that it holds.

As in ``ops/elementwise.py``: ``compiled`` reads the logits once and writes no fp32 copy of them. ``liger`` has no
function of this shape and is computed as ``compiled``. ``eager`` on a CPU takes a few rows at a time, so that all
passes but the first find them in the cache. The results are those of all rows at once, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_lpa.ops import elementwise_math as formulas
from megatron_lpa.ops.elementwise import compiled, dynamic, resolve

BLOCK_BYTES = 2**20
"""fp32 logits that one thread takes at a time on a CPU: they stay in a core's second-level cache."""


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
    if resolve(backend, scores) != "eager":
        return compiled(formulas.shard_statistics)(dynamic(scores, 0), dynamic(local, 0))
    parts = [formulas.shard_statistics(scores[rows], local[rows]) for rows in _blocks(scores)]
    if len(parts) == 1:
        return parts[0]
    largest, total, target = (torch.cat(column) for column in zip(*parts, strict=True))
    return largest, total, target


def shard_gradient(
    scores: torch.Tensor,
    local: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    upstream: torch.Tensor,
    backend: str,
    out: torch.Tensor,
) -> None:
    """``(softmax - one-hot) * upstream``, (M, W) in the dtype of ``scores``; see ``elementwise_math``.

    Args:
        scores, local, largest, total, upstream: as there.
        backend: one of ``elementwise.BACKENDS``.
        out: (M, W), where it is written; may be ``scores``.

    Raises:
        UserError: as ``elementwise.resolve``.
    """
    if resolve(backend, scores) != "eager":
        tensors = (scores, local, largest, total, upstream)
        out.copy_(compiled(formulas.shard_gradient)(*(dynamic(t, 0) for t in tensors)))
        return
    one = (local >= 0).to(largest.dtype).neg().unsqueeze(-1)
    column = local.clamp(min=0).unsqueeze(-1)
    largest, total, upstream = (t.unsqueeze(-1) for t in (largest, total, upstream))
    for rows in _blocks(scores):
        # In place: this is the largest tensor of a step.
        own = out[rows] if out.dtype == largest.dtype else None
        gradient = torch.sub(formulas.wide(scores[rows]), largest[rows], out=own)
        gradient.exp_().div_(total[rows]).scatter_add_(-1, column[rows], one[rows]).mul_(upstream[rows])
        if own is None:
            out[rows] = gradient


def _blocks(scores: torch.Tensor) -> Iterator[slice]:
    """Rows that are computed together: all of them, where there is no cache to keep or a compiler looks on."""
    count = len(scores)
    step = count
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(1, BLOCK_BYTES * torch.get_num_threads() // (4 * scores.shape[-1]))
    return (slice(start, start + step) for start in range(0, count, step))
