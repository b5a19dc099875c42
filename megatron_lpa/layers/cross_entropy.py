"""Next-token cross-entropy over logits that are split over the vocabulary.

V/T is the number of this rank's ids, M the number of tokens, b the bytes of an activation. Two ways:

* *whole*: the head writes logits, M V/T b bytes. They are kept as they are, with two numbers per token; the
  softmax is computed again in the backward pass, one chunk of tokens after another. The gradient is written
  over the logits of the head, so M V/T b is all there is at the peak; other callers' logits are left alone,
  and cost as much again.
* *chunked*: the head's product is part of the loss and done chunk by chunk, and again in the backward pass.
  No tensor of M V/T exists. The price is a third product of the head with its weight, 2 V D operations per
  token beside the 6 V D of the head and about 6 per parameter of everything else: for 3B (V = 32,000, D =
  4096) 0.26 of 20.1 GFLOP, 1.3 % of a step. What it saves at 16,384 tokens in bf16 is 1.0 GB of logits.

``auto`` takes *whole* until the logits are large. Computing gradients in the forward pass, as some libraries
do, needs the loss of every token to have the same weight; here the loss of each token is returned.

One rank's columns are computed as in ``ops/elementwise.py``: ``compiled`` reads the logits once and writes no
fp32 copy of them; Liger's own is not used (docs/kernels.md says why): ``liger`` is computed as ``compiled``.
``eager`` on a CPU takes a few rows at a time, so that all passes but the first find them in the cache; the
bits are those of all rows at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_lpa.config.kernels import LOSS_CHUNK_BYTES
from megatron_lpa.ops.elementwise import compiled, dynamic, resolve, wide
from megatron_lpa.ops.products import autocast_dtype
from megatron_lpa.parallel.collectives import all_reduce_no_grad
from megatron_lpa.parallel.groups import ParallelGroups

BLOCK_BYTES = 2**20
"""fp32 logits that one thread takes at a time on a CPU: they stay in a core's second-level cache."""


def mask_padded_ids(logits: torch.Tensor, vocab_size: int, first_id: int) -> torch.Tensor:
    """Set logits of ids at or above ``vocab_size`` to -inf: padded ids have probability zero.

    Args:
        logits: (..., V/T), ids ``first_id`` onwards.
        vocab_size: number of real ids.
        first_id: id of column 0.
    """
    real = real_columns(logits.shape[-1], vocab_size, first_id)
    if real == logits.shape[-1]:
        return logits
    padded = torch.arange(logits.shape[-1], device=logits.device) >= real
    return logits.masked_fill(padded, float("-inf"))


def real_columns(columns: int, vocab_size: int, first_id: int) -> int:
    """How many of ``columns`` ids from ``first_id`` on are real; the padded ones come last."""
    return min(max(vocab_size - first_id, 0), columns)


def _chunks(tokens: int, columns: int, dtype: torch.dtype) -> Iterator[slice]:
    step = max(1, LOSS_CHUNK_BYTES // (columns * (8 if dtype == torch.float64 else 4)))
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


class _Statistics:
    """Per token: the largest logit and the sum of exponentials over all ranks, and this rank's label column.

    Args:
        labels: (M,) int64.
        first_id: id of this rank's column 0.
        real: this rank's real ids.
        dtype: of the logits.
        backend: of ``ops/elementwise.py``.
    """

    def __init__(
        self, labels: torch.Tensor, first_id: int, real: int, dtype: torch.dtype, backend: str
    ) -> None:
        self.backend = backend
        local = labels - first_id
        self.local = local.masked_fill((local < 0) | (local >= real), -1)
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        # A rank without real ids adds nothing: finite, because -inf minus -inf is no number.
        self.largest = labels.new_full(labels.shape, torch.finfo(sums).min, dtype=sums)
        self.total = labels.new_zeros(labels.shape, dtype=sums)
        self.target = labels.new_zeros(labels.shape, dtype=sums)

    def add(self, chunk: slice, scores: torch.Tensor) -> None:
        """Take in the real logits (m, real) of a chunk of tokens."""
        self.largest[chunk], self.total[chunk], self.target[chunk] = shard_statistics(
            scores, self.local[chunk], self.backend
        )

    def losses(self, groups: ParallelGroups) -> torch.Tensor:
        """(M,); afterwards the statistics are those of all ranks. Two all-reduces, whatever the chunks."""
        own = self.largest
        if groups.tp_size > 1:
            self.largest = all_reduce_no_grad(own.clone(), groups, dist.ReduceOp.MAX)
        target = (self.target - self.largest).masked_fill(self.local < 0, 0.0)
        sums = torch.stack((self.total * torch.exp(own - self.largest), target))
        if groups.tp_size > 1:
            sums = all_reduce_no_grad(sums, groups, dist.ReduceOp.SUM)
        self.total, target = sums
        return self.total.log() - target


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        groups: ParallelGroups,
        vocab_size: int,
        backend: str,
        overwrite: bool,
    ) -> torch.Tensor:
        columns = logits.shape[-1]
        first_id = groups.tp_rank * columns
        ctx.real, ctx.backend = real_columns(columns, vocab_size, first_id), backend
        # A compiler refuses a backward pass that writes over what was saved, and plans the memory itself.
        ctx.overwrite = overwrite and not torch.compiler.is_compiling()
        rows = logits.reshape(-1, columns)
        found = _Statistics(labels.reshape(-1), first_id, ctx.real, logits.dtype, backend)
        for chunk in _chunks(len(rows), columns, logits.dtype) if ctx.real else ():
            found.add(chunk, rows[chunk, : ctx.real])
        losses = found.losses(groups)
        ctx.save_for_backward(logits, found.local, found.largest, found.total)
        return losses.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        logits, local, largest, total = ctx.saved_tensors
        columns = logits.shape[-1]
        rows, upstream = logits.detach().reshape(-1, columns), upstream.reshape(-1)
        gradient = rows if ctx.overwrite else torch.empty_like(rows, memory_format=torch.contiguous_format)
        gradient[:, ctx.real :] = 0
        for chunk in _chunks(len(rows), columns, logits.dtype) if ctx.real else ():
            shard_gradient(
                rows[chunk, : ctx.real], local[chunk], largest[chunk], total[chunk], upstream[chunk],
                ctx.backend, gradient[chunk, : ctx.real],
            )  # fmt: skip
        return gradient.view(logits.shape), None, None, None, None, None


class _Chunked(torch.autograd.Function):
    """Saves its inputs as they were passed: under ZeRO-3 the weight is the parameter itself, whose storage
    DeepSpeed empties after the head's forward and fills again before its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        groups: ParallelGroups,
        vocab_size: int,
        backend: str,
    ) -> torch.Tensor:
        columns = weight.shape[0]
        first_id = groups.tp_rank * columns
        ctx.real, ctx.backend = real_columns(columns, vocab_size, first_id), backend
        rows = x.reshape(-1, x.shape[-1])
        found = _Statistics(labels.reshape(-1), first_id, ctx.real, x.dtype, backend)
        for chunk in _chunks(len(rows), columns, x.dtype) if ctx.real else ():
            found.add(chunk, _scores(rows[chunk], weight, bias, ctx.real))
        losses = found.losses(groups)
        ctx.save_for_backward(x, weight, bias, found.local, found.largest, found.total)
        return losses.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, local, largest, total = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows, upstream, real = x.reshape(-1, x.shape[-1]), upstream.reshape(-1), ctx.real
        # Sums over chunks in fp32: rounding after every chunk would add up.
        sums = torch.float64 if x.dtype == torch.float64 else torch.float32
        dx = torch.zeros_like(rows) if need_x else None
        dw = torch.zeros_like(weight, dtype=sums) if need_weight else None
        db = torch.zeros_like(bias, dtype=sums) if need_bias else None
        for chunk in _chunks(len(rows), weight.shape[0], x.dtype) if real else ():
            part = rows[chunk]
            scores = _scores(part, weight, bias, real)
            shard_gradient(
                scores, local[chunk], largest[chunk], total[chunk], upstream[chunk], ctx.backend, out=scores
            )
            if dx is not None:
                torch.mm(scores, weight[:real], out=dx[chunk])
            if dw is not None:
                if dw.dtype == scores.dtype:
                    dw[:real].addmm_(scores.t(), part)
                else:
                    dw[:real] += scores.t() @ part
            if db is not None:
                db[:real] += scores.sum(0, dtype=sums)
        return (
            None if dx is None else dx.view(x.shape),
            None if dw is None else dw.to(weight.dtype),
            None if db is None else db.to(bias.dtype),
            None, None, None, None,
        )  # fmt: skip


def _scores(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, real: int) -> torch.Tensor:
    return functional.linear(x, weight[:real], None if bias is None else bias[:real])


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    groups: ParallelGroups,
    vocab_size: int,
    backend: str = "eager",
    overwrite: bool = False,
) -> torch.Tensor:
    """``-log softmax(logits)[label]`` per token, without gathering the logits.

    Args:
        logits: (B, S, V/T), this rank's ids.
        labels: (B, S) int64, below ``vocab_size``.
        groups: process groups.
        vocab_size: number of real ids; padded ids above take no part.
        backend: of ``ops/elementwise.py``.
        overwrite: the backward pass writes the gradient over the logits, which nothing else may need then. A
            second one fails, with PyTorch's message that what it needs has been modified.

    Returns:
        (B, S) fp32 (fp64 for fp64 logits), equal on all ranks of the tensor-parallel group.
    """
    return _Whole.apply(logits, labels, groups, vocab_size, backend, overwrite)


def chunked_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    groups: ParallelGroups,
    vocab_size: int,
    backend: str = "eager",
) -> torch.Tensor:
    """The same of ``logits = x weight^T + bias``, which are never there at once.

    Args:
        x: (B, S, D), replicated; its gradient is this rank's part, for ``copy_to_tp`` to sum.
        weight: (V/T, D), this rank's ids.
        bias: (V/T,) or None.
        labels: (B, S) int64, below ``vocab_size``.
        groups: process groups.
        vocab_size: number of real ids.
        backend: of ``ops/elementwise.py``.

    Returns:
        (B, S) fp32 (fp64 for fp64 x), equal on all ranks of the tensor-parallel group.
    """
    # Autocast has ended when the backward pass computes the logits again; they have to be the same ones.
    dtype = autocast_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Chunked.apply(x, weight, bias, labels, groups, vocab_size, backend)


def shard_statistics(
    scores: torch.Tensor, local: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest logit, sum of ``exp(logit - largest)`` and label's logit of each row: ``statistics_at_once``.

    Args:
        scores: (M, W), W at least 1.
        local: (M,) int64, the label's column or -1.
        backend: one of ``elementwise.BACKENDS``.

    Raises:
        UserError: as ``elementwise.resolve``.
    """
    if resolve(backend, scores) != "eager":
        return compiled(statistics_at_once)(dynamic(scores, 0), dynamic(local, 0))
    if not _takes_blocks(scores):
        return statistics_at_once(scores, local)
    space = _space(scores)
    largest, total = (space.new_empty(len(scores)) for _ in range(2))
    for rows in _blocks(scores, space):
        part = _widened(scores[rows], space)
        torch.amax(part, -1, out=largest[rows])
        shifted = torch.sub(part, largest[rows].unsqueeze(-1), out=space[: len(part)])
        torch.sum(shifted.exp_(), -1, out=total[rows])
    return largest, total, label_logits(scores, local)


def shard_gradient(
    scores: torch.Tensor,
    local: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    upstream: torch.Tensor,
    backend: str,
    out: torch.Tensor,
) -> None:
    """Gradient of the loss by this rank's logits, (M, W) in their dtype: ``(softmax - one-hot) * upstream``.

    Args:
        scores, local: as in ``shard_statistics``.
        largest: (M,) over all ranks.
        total: (M,) over all ranks, of ``exp(logit - largest)``.
        upstream: (M,).
        backend: one of ``elementwise.BACKENDS``.
        out: (M, W), where it is written; may be ``scores``.

    Raises:
        UserError: as ``elementwise.resolve``.
    """
    if resolve(backend, scores) != "eager":
        tensors = (scores, local, largest, total, upstream)
        out.copy_(compiled(gradient_at_once)(*(dynamic(t, 0) for t in tensors)))
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
        part = wide(scores[rows]) if space is None else _widened(scores[rows], space)
        gradient = torch.sub(part, largest[rows], out=part if own is None else own)
        gradient.exp_().div_(total[rows]).scatter_add_(-1, column[rows], one[rows]).mul_(upstream[rows])
        if own is None:
            out[rows] = gradient


def _takes_blocks(scores: torch.Tensor) -> bool:
    """Whether there is a cache to keep, and no compiler that looks on."""
    return scores.device.type == "cpu" and not torch.compiler.is_compiling()


def _space(scores: torch.Tensor) -> torch.Tensor:
    """Memory for one block, (rows, W) in the dtype that is computed in: used again, so it stays cached."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    rows = max(2, BLOCK_BYTES * torch.get_num_threads() // (dtype.itemsize * scores.shape[-1]))
    return scores.new_empty((min(rows + 1, len(scores)), scores.shape[-1]), dtype=dtype)


def _blocks(scores: torch.Tensor, space: torch.Tensor) -> list[slice]:
    """Rows that ``space`` has room for. Never a last one alone: threads share its sum, whose bits differ."""
    count, step = len(scores), max(1, len(space) - 1)
    starts = list(range(0, count, step))
    if count > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, count])]


def _widened(part: torch.Tensor, space: torch.Tensor) -> torch.Tensor:
    """The block as it is, or in ``space`` in the dtype that is computed in."""
    return part if part.dtype == space.dtype else space[: len(part)].copy_(part)


def statistics_at_once(
    scores: torch.Tensor, local: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a row's cross-entropy needs of this rank's logits.

    Args:
        scores: (M, W) logits.
        local: (M,) int64, the label's column, or -1 where it is not among these columns.

    Returns:
        (M,) each in fp32: the largest logit, the sum of ``exp(logit - largest)``, the label's (0 for -1).
    """
    h = wide(scores)
    largest = h.amax(-1)
    total = torch.exp(h - largest.unsqueeze(-1)).sum(-1)
    return largest, total, label_logits(scores, local)


def label_logits(scores: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The third of ``statistics_at_once``: (M, W), (M,) -> (M,)"""
    target = wide(scores.gather(-1, local.clamp(min=0).unsqueeze(-1)).squeeze(-1))
    return torch.where(local < 0, 0.0, target)


def gradient_at_once(
    scores: torch.Tensor,
    local: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    upstream: torch.Tensor,
) -> torch.Tensor:
    """``shard_gradient`` of all rows at once, in tensors of its own."""
    softmax = torch.exp(wide(scores) - largest.unsqueeze(-1)) / total.unsqueeze(-1)
    columns = torch.arange(scores.shape[-1], device=scores.device)
    hit = columns == local.unsqueeze(-1)
    return ((softmax - hit.to(softmax.dtype)) * upstream.unsqueeze(-1)).to(scores.dtype)
