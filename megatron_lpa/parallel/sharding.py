"""Which dimension of which parameter is split over tensor-parallel ranks; split and merge.

Every parameter of the decoder carries a ``ParameterSpec`` (``spec_of``). Whatever needs to know how a
parameter is laid out (initial values, gradient norms, checkpoints, exports) reads it from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from megatron_lpa.structures.parameter_spec import ParameterSpec


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
