"""Dense linears: Megatron's column-parallel and row-parallel matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lpa.layers.structure import Collective, Parameters
from megatron_lpa.ops.products import linear
from megatron_lpa.parallel.collectives import reduce_from_tp
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import ParameterSpec


@dataclass(frozen=True)
class DenseInput:
    """Column-parallel ``y = x W^T + b``: W (d_out, d_in) and b are split along d_out."""

    d_in: int
    d_out: int
    bias: bool
    collective: Collective = "none"

    def specs(self) -> dict[str, ParameterSpec]:
        """``weight`` (d_out, d_in), ``bias`` (d_out,)."""
        specs = {"weight": ParameterSpec((self.d_out, self.d_in), "input", self.d_in, tp_dim=0)}
        if self.bias:
            specs["bias"] = ParameterSpec((self.d_out,), "bias", self.d_in, tp_dim=0)
        return specs

    def before(self, x: torch.Tensor, p: Parameters) -> torch.Tensor:
        """(..., d_in) -> (..., d_out/T)"""
        return linear(x, p["weight"], p.get("bias"))

    def after(self, y: torch.Tensor, p: Parameters) -> torch.Tensor:
        """Nothing is left to do."""
        return y


@dataclass(frozen=True)
class DenseOutput:
    """Row-parallel ``y = x W^T + b``: W (d_out, d_in) is split along d_in, b is replicated."""

    d_in: int
    d_out: int
    bias: bool

    def specs(self) -> dict[str, ParameterSpec]:
        """``weight`` (d_out, d_in), ``bias`` (d_out,)."""
        specs = {"weight": ParameterSpec((self.d_out, self.d_in), "output", self.d_in, tp_dim=1)}
        if self.bias:
            specs["bias"] = ParameterSpec((self.d_out,), "bias", self.d_in)
        return specs

    def apply(self, x: torch.Tensor, p: Parameters, groups: ParallelGroups) -> torch.Tensor:
        """(..., d_in/T) -> (..., d_out): one all-reduce of the output."""
        y = reduce_from_tp(linear(x, p["weight"], None), groups)
        return y if "bias" not in p else y + p["bias"].to(y.dtype)
