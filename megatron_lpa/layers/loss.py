"""Next-token cross-entropy over logits that are split over the vocabulary.

V/T is the number of this rank's ids, M the number of tokens, b the bytes of an activation. Two ways:

* *whole*: the head writes logits, M V/T b bytes. They are kept as they are, with two numbers per token; the
  softmax is computed again in the backward pass, one chunk of tokens after another. The gradient is written over
  the logits of the head, so M V/T b is all there is at the peak; other callers' logits are left alone, and cost as
  much again.
* *chunked*: the head's product is part of the loss and done chunk by chunk, and again in the backward pass. No
  tensor of M V/T exists. The price is a third product of the head with its weight, 2 V D operations per token
  beside the 6 V D of the head and about 6 per parameter of everything else: for 3B (V = 32,000, D = 4096) 0.26 of
  20.1 GFLOP, 1.3 % of a step. What it saves at 16,384 tokens in bf16 is 1.0 GB of logits.

Keeping half-precision logits chunk by chunk instead would be *whole* with the memory of *whole*. Computing
gradients in the forward pass, as some libraries do, needs the loss of every token to have the same weight, and
this function returns a loss per token. So ``auto`` takes *whole* until the logits are large.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_lpa.config.kernels import chunk_tokens
from megatron_lpa.ops import cross_entropy as ops
from megatron_lpa.ops.products import autocast_dtype
from megatron_lpa.parallel.collectives import all_reduce_no_grad
from megatron_lpa.parallel.groups import ParallelGroups


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
    step = chunk_tokens(columns, 8 if dtype == torch.float64 else 4)
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
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # A rank without real ids adds nothing: finite, because -inf minus -inf is no number.
        self.largest = labels.new_full(labels.shape, torch.finfo(wide).min, dtype=wide)
        self.total = labels.new_zeros(labels.shape, dtype=wide)
        self.target = labels.new_zeros(labels.shape, dtype=wide)

    def add(self, chunk: slice, scores: torch.Tensor) -> None:
        """Take in the real logits (m, real) of a chunk of tokens."""
        self.largest[chunk], self.total[chunk], self.target[chunk] = ops.shard_statistics(
            scores, self.local[chunk], self.backend
        )

    def losses(self, groups: ParallelGroups) -> torch.Tensor:
        """(M,); afterwards the statistics are those of all ranks. Two all-reduces, whatever the chunks."""
        own = self.largest
        self.largest = all_reduce_no_grad(own.clone(), groups, dist.ReduceOp.MAX)
        target = (self.target - self.largest).masked_fill(self.local < 0, 0.0)
        sums = torch.stack((self.total * torch.exp(own - self.largest), target))
        self.total, target = all_reduce_no_grad(sums, groups, dist.ReduceOp.SUM)
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
        if ctx.real:
            for chunk in _chunks(len(rows), columns, logits.dtype):
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
        if ctx.real:
            for chunk in _chunks(len(rows), columns, logits.dtype):
                ops.shard_gradient(
                    rows[chunk, : ctx.real],
                    local[chunk],
                    largest[chunk],
                    total[chunk],
                    upstream[chunk],
                    ctx.backend,
                    out=gradient[chunk, : ctx.real],
                )
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
        if ctx.real:
            for chunk in _chunks(len(rows), columns, x.dtype):
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
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        dx = torch.zeros_like(rows) if need_x else None
        dw = torch.zeros_like(weight, dtype=wide) if need_weight else None
        db = torch.zeros_like(bias, dtype=wide) if need_bias else None
        for chunk in _chunks(len(rows), weight.shape[0], x.dtype) if real else ():
            part = rows[chunk]
            scores = _scores(part, weight, bias, real)
            ops.shard_gradient(
                scores, local[chunk], largest[chunk], total[chunk], upstream[chunk], ctx.backend, out=scores
            )
            grads = scores
            if dx is not None:
                torch.mm(grads, weight[:real], out=dx[chunk])
            if dw is not None:
                if dw.dtype == grads.dtype:
                    dw[:real].addmm_(grads.t(), part)
                else:
                    dw[:real] += grads.t() @ part
            if db is not None:
                db[:real] += grads.sum(0, dtype=wide)
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
        overwrite: the backward pass writes the gradient over the logits, which nothing else may need then. A second
            one fails, with PyTorch's message that what it needs has been modified.

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
