"""Which dimension of which parameter is split over tensor-parallel ranks; split and merge.

Every parameter of the decoder carries a ``ParameterSpec`` (``spec_of``). Whatever needs to know how a
parameter is laid out (initial values, gradient norms, checkpoints, exports) reads it from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from megatron_lpa.config import OptimConfig

Role = Literal["embedding", "input", "output", "head", "bias", "norm_weight", "norm_bias"]


@dataclass(frozen=True)
class ParameterSpec:
    """The unsharded parameter behind a shard.

    Args:
        shape: shape of the unsharded parameter.
        role: what it is for; decides initial values and weight decay. ``input`` and ``output`` are
            matrices that read, or write, the residual stream.
        fan_in: input width of the linear that the parameter belongs to.
        tp_dim: dimension split over tensor-parallel ranks; None where every rank holds all of it.
        rank: ``r`` of the low-dimensional module the parameter belongs to; None for dense ones.
        real_rows: rows before vocabulary padding; None where rows are not vocabulary ids.
    """

    shape: tuple[int, ...]
    role: Role
    fan_in: int
    tp_dim: int | None = None
    rank: int | None = None
    real_rows: int | None = None

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of one rank's shard."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            assert shape[self.tp_dim] % tp_size == 0, (self, tp_size)
            shape[self.tp_dim] //= tp_size
        return tuple(shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies, unless something else is asked for: to matrices only."""
        return self.decays_by(OptimConfig())

    def decays_by(self, optim: OptimConfig) -> bool:
        """Whether weight decay applies with these settings."""
        if self.role in ("norm_weight", "norm_bias"):
            return optim.decay_norms
        return optim.decay_biases or self.role != "bias"


def new_parameter(spec: ParameterSpec, tp_size: int) -> nn.Parameter:
    """An uninitialised parameter holding this rank's shard, marked for DeepSpeed.

    Without ``tensor_model_parallel`` DeepSpeed would silently leave the shards of tensor-parallel
    ranks above 0 out of the global gradient norm.
    """
    parameter = nn.Parameter(torch.empty(spec.local_shape(tp_size)))
    sharded = tp_size > 1 and spec.tp_dim is not None
    marks = {"spec": spec, "tensor_model_parallel": sharded, "model_parallel": sharded}
    for name, value in marks.items():
        setattr(parameter, name, value)
    return parameter


def spec_of(parameter: nn.Parameter) -> ParameterSpec:
    """The spec that ``new_parameter`` attached."""
    return cast(ParameterSpec, parameter.spec)  # type: ignore[attr-defined]


def split(full: torch.Tensor, spec: ParameterSpec, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This rank's shard of an unsharded tensor (a view)."""
    assert tuple(full.shape) == spec.shape, (full.shape, spec)
    if spec.tp_dim is None:
        return full
    return full.chunk(tp_size, dim=spec.tp_dim)[tp_rank]


def merge(shards: Sequence[torch.Tensor], spec: ParameterSpec) -> torch.Tensor:
    """The unsharded tensor from the shards of all ranks, in order of ``tp_rank``."""
    if spec.tp_dim is None:
        return shards[0]
    return torch.cat(list(shards), dim=spec.tp_dim)
