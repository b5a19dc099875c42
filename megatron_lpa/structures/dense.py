"""Dense linears: Megatron's column-parallel and row-parallel matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_lpa.structures.parameter_spec import ParameterSpec
from megatron_lpa.structures.structure import (
    Collective,
    InputStructure,
    Operations,
    OutputStructure,
    Parameters,
)

if TYPE_CHECKING:
    import torch


class DenseInput(InputStructure):
    """Column-parallel ``y = x W^T + b``: W (d_out, d_in) and b are split along d_out."""

    collective: Collective = "none"

    def specs(self) -> dict[str, ParameterSpec]:
        """``weight`` (d_out, d_in), ``bias`` (d_out,)."""
        specs = {"weight": ParameterSpec((self.d_out, self.d_in), "input", self.d_in, tp_dim=0)}
        if self.biases[1]:
            specs["bias"] = ParameterSpec((self.d_out,), "bias", self.d_in, tp_dim=0)
        return specs

    def moved(self) -> tuple[int, int]:
        """Nothing."""
        return 0, 0

    def kept(self) -> int:
        """Nothing."""
        return 0

    def products(self) -> int:
        """The rank's part of the output."""
        return self.d_out // self.tp_size

    @staticmethod
    def before(
        members: Sequence[tuple[DenseInput, Parameters]], x: torch.Tensor, ops: Operations
    ) -> Sequence[torch.Tensor]:
        """(..., d_in) -> (..., d_out/T) each"""
        return ops.linears(x, [p["weight"] for _, p in members], [p.get("bias") for _, p in members])


class DenseOutput(OutputStructure):
    """Row-parallel ``y = x W^T + b``: W (d_out, d_in) is split along d_in, b is replicated."""

    def specs(self) -> dict[str, ParameterSpec]:
        """``weight`` (d_out, d_in), ``bias`` (d_out,)."""
        specs = {"weight": ParameterSpec((self.d_out, self.d_in), "output", self.d_in, tp_dim=1)}
        if self.biases[1]:
            specs["bias"] = ParameterSpec((self.d_out,), "bias", self.d_in)
        return specs

    def moved(self) -> tuple[int, int]:
        """The all-reduce of the output."""
        return 2 * self.d_out, 0

    def kept(self) -> int:
        """Nothing."""
        return 0

    def products(self) -> int:
        """The output's partial sums."""
        return self.d_out

    def apply(self, x: torch.Tensor, p: Parameters, ops: Operations) -> torch.Tensor:
        """(..., d_in/T) -> (..., d_out): one all-reduce of the output."""
        y = ops.linear(x, p["weight"], None)
        if self.tp_size > 1:
            y = ops.reduce_from_tp(y)
        return y if "bias" not in p else y + p["bias"].to(y.dtype)
