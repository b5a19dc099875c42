"""The parts of a cross-entropy that one rank computes by itself, over the columns that it holds.

As in ``ops/elementwise.py``: ``compiled`` reads the logits once and writes no fp32 copy of them. ``liger`` has no
function of this shape and is computed as ``compiled``. ``eager`` on a CPU takes a few rows at a time, so that all
passes but the first find them in the cache. The results are those of all rows at once, bit for bit.
"""

from __future__ import annotations

import itertools

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
    if not _takes_blocks(scores):
        return formulas.shard_statistics(scores, local)
    space = _space(scores)
    largest, total = (space.new_empty(len(scores)) for _ in range(2))
    for rows in _blocks(scores, space):
        part = _widened(scores[rows], space)
        torch.amax(part, -1, out=largest[rows])
        shifted = torch.sub(part, largest[rows].unsqueeze(-1), out=space[: len(part)])
        torch.sum(shifted.exp_(), -1, out=total[rows])
    return largest, total, formulas.label_logits(scores, local)


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
    blocks, space = [slice(None)], None
    if _takes_blocks(scores):
        space = _space(scores)
        blocks = _blocks(scores, space)
    for rows in blocks:
        # In place: this is the largest tensor of a step.
        own = out[rows] if out.dtype == largest.dtype else None
        part = formulas.wide(scores[rows]) if space is None else _widened(scores[rows], space)
        gradient = torch.sub(part, largest[rows], out=part if own is None else own)
        gradient.exp_().div_(total[rows]).scatter_add_(-1, column[rows], one[rows]).mul_(upstream[rows])
        if own is None:
            out[rows] = gradient


def _takes_blocks(scores: torch.Tensor) -> bool:
    """Whether there is a cache to keep, and no compiler that looks on."""
    return scores.device.type == "cpu" and not torch.compiler.is_compiling()


def _space(scores: torch.Tensor) -> torch.Tensor:
    """Memory for one block, (rows, W) in the dtype that is computed in: used again and again, so it stays cached."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    rows = max(2, BLOCK_BYTES * torch.get_num_threads() // (dtype.itemsize * scores.shape[-1]))
    return scores.new_empty((min(rows + 1, len(scores)), scores.shape[-1]), dtype=dtype)


def _blocks(scores: torch.Tensor, space: torch.Tensor) -> list[slice]:
    """Rows that ``space`` has room for. Never one of several alone: threads share its sum, and its last bits differ."""
    count, step = len(scores), max(1, len(space) - 1)
    starts = list(range(0, count, step))
    if count > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, count])]


def _widened(part: torch.Tensor, space: torch.Tensor) -> torch.Tensor:
    """The block as it is, or in ``space`` in the dtype that is computed in."""
    return part if part.dtype == space.dtype else space[: len(part)].copy_(part)
