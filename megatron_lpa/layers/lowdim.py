"""Low-dimensional modules ``z = W_B (W_A x)`` (paper, Section 3.1) in two tensor-parallel layouts.

Layout ``column_row`` splits both matrices along r: column-parallel W_A, row-parallel W_B. Layout ``latent``
exchanges the r-dimensional latents instead of activations. Results are equal; what is moved is not.
Elements per token, forward, times (T-1)/T, with an all-reduce counted as 2n:

| | input side (q, k, v, up, gate) | output side (o, down) |
|---|---|---|
| ``column_row`` | reduce-scatter of the output: d_out | reduce-scatter of the latent, all-reduce of the output: r + 2 d_out |
| ``latent`` | all-gather of the latent: r | all-reduce of the latent: 2r |

On the output side the input is already split over ranks (by heads, or FFN columns), so W_A is split
along d_in in both layouts: gathering the input to split W_A along r would move d_in instead of r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lpa.layers.structure import Collective, Parameters
from megatron_lpa.ops.products import Pair, linear, lowdim_linear
from megatron_lpa.parallel.collectives import reduce_from_tp, reduce_scatter_shards
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import ParameterSpec


@dataclass(frozen=True)
class LowDimInput:
    """Input side in either layout.

    Args:
        d_in: input width.
        d_out: output width, split over ranks.
        r: rank of the module, split over ranks.
        latent_bias: whether W_A has a bias.
        output_bias: whether W_B has a bias.
        tp_size: tensor-parallel size.
        layout: ``column_row`` splits W_B along r, ``latent`` along d_out.
    """

    d_in: int
    d_out: int
    r: int
    latent_bias: bool
    output_bias: bool
    tp_size: int
    layout: str

    @property
    def collective(self) -> Collective:
        """``column_row`` sums outputs, ``latent`` collects latents."""
        if self.tp_size == 1:
            return "none"
        return "reduce_scatter" if self.layout == "column_row" else "gather"

    @property
    def multiplies_at_once(self) -> bool:
        """Whether no collective comes between the two products, so that one kernel can do both."""
        return self.tp_size == 1 or self.layout == "column_row"

    def pair(self, p: Parameters) -> Pair:
        """The factors, for a product of several modules at once."""
        # Sums that are still to be made get the output's bias afterwards, once.
        return Pair(p["w_a"], p["w_b"], p.get("bias_a"), p.get("bias_b") if self.tp_size == 1 else None)

    def shaped(self, product: torch.Tensor) -> torch.Tensor:
        """What ``before`` returns, from the product with ``pair``."""
        return product if self.tp_size == 1 else product.unflatten(-1, (self.tp_size, -1))

    def specs(self) -> dict[str, ParameterSpec]:
        """``w_a`` (r, d_in), ``w_b`` (d_out, r), ``bias_a`` (r,), ``bias_b`` (d_out,)."""
        b_dim = 1 if self.layout == "column_row" else 0
        specs = {
            "w_a": ParameterSpec((self.r, self.d_in), "input", self.d_in, tp_dim=0, rank=self.r),
            "w_b": ParameterSpec((self.d_out, self.r), "input", self.r, tp_dim=b_dim, rank=self.r),
        }
        if self.latent_bias:
            specs["bias_a"] = ParameterSpec((self.r,), "bias", self.d_in, tp_dim=0, rank=self.r)
        if self.output_bias:
            specs["bias_b"] = ParameterSpec((self.d_out,), "bias", self.r, tp_dim=0, rank=self.r)
        return specs

    def before(self, x: torch.Tensor, p: Parameters) -> torch.Tensor:
        """(..., d_in) -> the output, (..., T, d_out/T) partial sums of it, or the latents (..., r/T)."""
        if self.multiplies_at_once:
            return self.shaped(lowdim_linear(x, *self.pair(p)))
        return linear(x, p["w_a"], p.get("bias_a"))

    def after(self, y: torch.Tensor, p: Parameters) -> torch.Tensor:
        """The sums are the output; latents (..., T, r/T) go through W_B to (..., d_out/T)."""
        if self.layout == "column_row":
            return y if "bias_b" not in p else y + p["bias_b"].to(y.dtype)
        return linear(y.flatten(-2), p["w_b"], p.get("bias_b"))


@dataclass(frozen=True)
class LowDimOutput:
    """Output side in either layout.

    Args:
        d_in: input width, split over ranks.
        d_out: output width, replicated.
        r: rank of the module.
        latent_bias: whether W_A has a bias.
        output_bias: whether W_B has a bias.
        tp_size: tensor-parallel size.
        layout: ``column_row`` splits W_B along r; ``latent`` keeps W_B whole on every rank, which costs its
            memory and product T times and saves the all-reduce of the output.
        path: how the product is computed where one process has both factors whole.
    """

    d_in: int
    d_out: int
    r: int
    latent_bias: bool
    output_bias: bool
    tp_size: int
    layout: str
    path: str = "auto"

    def specs(self) -> dict[str, ParameterSpec]:
        """``w_a`` (r, d_in), ``w_b`` (d_out, r), ``bias_a`` (r,), ``bias_b`` (d_out,)."""
        b_dim = 1 if self.layout == "column_row" else None
        specs = {
            "w_a": ParameterSpec((self.r, self.d_in), "output", self.d_in, tp_dim=1, rank=self.r),
            "w_b": ParameterSpec((self.d_out, self.r), "output", self.r, tp_dim=b_dim, rank=self.r),
        }
        if self.latent_bias:
            a_dim = 0 if self.layout == "column_row" else None
            specs["bias_a"] = ParameterSpec((self.r,), "bias", self.d_in, tp_dim=a_dim, rank=self.r)
        if self.output_bias:
            specs["bias_b"] = ParameterSpec((self.d_out,), "bias", self.r, rank=self.r)
        return specs

    def apply(self, x: torch.Tensor, p: Parameters, groups: ParallelGroups) -> torch.Tensor:
        """(..., d_in/T) -> (..., d_out)"""
        if self.tp_size == 1:
            return lowdim_linear(x, p["w_a"], p["w_b"], p.get("bias_a"), p.get("bias_b"), self.path)
        latent = linear(x, p["w_a"], None)
        if self.layout == "latent":
            latent = reduce_from_tp(latent, groups)
            latent = latent if "bias_a" not in p else latent + p["bias_a"].to(latent.dtype)
            return linear(latent, p["w_b"], p.get("bias_b"))
        latent = reduce_scatter_shards(latent.unflatten(-1, (self.tp_size, -1)), groups)
        latent = latent if "bias_a" not in p else latent + p["bias_a"].to(latent.dtype)
        y = reduce_from_tp(linear(latent, p["w_b"], None), groups)
        return y if "bias_b" not in p else y + p["bias_b"].to(y.dtype)
