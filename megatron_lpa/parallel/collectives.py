"""Tensor-parallel collectives as autograd functions. Each is the adjoint of another of this file.

| function | forward | backward |
|---|---|---|
| ``copy_to_tp`` | nothing | all-reduce |
| ``reduce_from_tp`` | all-reduce | nothing |
| ``gather_shards`` | all-gather | reduce-scatter |
| ``reduce_scatter_shards`` | reduce-scatter | all-gather |

Shapes: ``T`` is the tensor-parallel size; a *sharded axis* of width T*w is written as two axes
``(T, w)``, so that several tensors of different widths travel in one call by concatenation along w.
With ``tp_size == 1`` every function returns its input (reshaped), and nothing is sent or counted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_lpa.parallel.groups import ParallelGroups


def _all_reduce(x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    summed = x.contiguous().clone()
    groups.traffic.record("all_reduce", summed, groups.tp_size)
    dist.all_reduce(summed, group=groups.tp_group)
    return summed


def _all_gather(x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """(..., w) -> (..., T, w)"""
    gathered = x.new_empty((groups.tp_size, *x.shape))
    groups.traffic.record("all_gather", gathered, groups.tp_size)
    # Flat views: gloo compares leading dimensions, NCCL only counts elements.
    dist.all_gather_into_tensor(gathered.view(-1), x.contiguous().view(-1), group=groups.tp_group)
    return gathered.movedim(0, -2)


def _reduce_scatter(x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """(..., T, w) -> (..., w)"""
    sent = x.movedim(-2, 0).contiguous()
    groups.traffic.record("reduce_scatter", sent, groups.tp_size)
    received = torch.empty_like(sent[0])
    dist.reduce_scatter_tensor(received.view(-1), sent.view(-1), group=groups.tp_group)
    return received


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
        ctx.groups = groups
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(grads[0], ctx.groups), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
        return _all_reduce(x, groups)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _GatherShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
        ctx.groups = groups
        return _all_gather(x, groups)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduce_scatter(grads[0], ctx.groups), None


class _ReduceScatterShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
        ctx.groups = groups
        return _reduce_scatter(x, groups)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_gather(grads[0], ctx.groups), None


def copy_to_tp(x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Pass a replicated tensor to computations that differ by rank: gradients are summed."""
    if groups.tp_size == 1:
        return x
    return _CopyToTP.apply(x, groups)


def reduce_from_tp(x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Sum partial results of all ranks; every rank gets the sum."""
    if groups.tp_size == 1:
        return x
    return _ReduceFromTP.apply(x, groups)


def gather_shards(x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """(..., w) on each rank -> (..., T, w) on every rank. Gradients are partial and are summed."""
    if groups.tp_size == 1:
        return x.unsqueeze(-2)
    return _GatherShards.apply(x, groups)


def reduce_scatter_shards(x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """(..., T, w) partial sums on each rank -> (..., w), the own part of the sum."""
    if groups.tp_size == 1:
        return x.squeeze(-2)
    return _ReduceScatterShards.apply(x, groups)


def all_reduce_no_grad(x: torch.Tensor, groups: ParallelGroups, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """All-reduce in the tensor-parallel group outside autograd, for losses and norms; in place."""
    if groups.tp_size > 1:
        groups.traffic.record("all_reduce", x, groups.tp_size)
        dist.all_reduce(x, op=op, group=groups.tp_group)
    return x
