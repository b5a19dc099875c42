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
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_lpa.structures.parameter_spec import ParameterSpec
from megatron_lpa.structures.structure import (
    Collective,
    InputStructure,
    Operations,
    OutputStructure,
    Parameters,
    Structure,
    said_of,
)

if TYPE_CHECKING:
    import torch

Members = Sequence[tuple["LowDimInput", Parameters]]


class _LowDim(Structure):
    """What both sides have in common."""

    numbers = ("rank",)
    has_latent_bias = True

    @property
    def splits_r(self) -> bool:
        """Whether both matrices are split along r."""
        return self.layout == "column_row"

    def split_sizes(self, key: str, where: str) -> dict[str, int]:
        """The rank."""
        return {said_of("rank", key, where): self.r}

    def kept(self) -> int:
        """The latent: whole where it was exchanged."""
        return self.r // self.tp_size if self.splits_r else self.r


class LowDimInput(_LowDim, InputStructure):
    """Input side in either layout: ``column_row`` splits W_B along r, ``latent`` along d_out."""

    @property
    def collective(self) -> Collective:
        """``column_row`` sums outputs, ``latent`` collects latents."""
        if self.tp_size == 1:
            return "none"
        return "reduce_scatter" if self.splits_r else "gather"

    @property
    def folds(self) -> bool:
        """With tensor parallelism ranks have only parts of the norm's gradient, and sums of outputs are still
        to be made."""
        return self.tp_size == 1

    def default_biases(self) -> tuple[bool, bool]:
        """On the latent, as in the paper's code."""
        return self.linear_bias, False

    def specs(self) -> dict[str, ParameterSpec]:
        """``w_a`` (r, d_in), ``w_b`` (d_out, r), ``bias_a`` (r,), ``bias_b`` (d_out,)."""
        b_dim = 1 if self.splits_r else 0
        specs = {
            "w_a": ParameterSpec((self.r, self.d_in), "input", self.d_in, tp_dim=0, rank=self.r),
            "w_b": ParameterSpec((self.d_out, self.r), "input", self.r, tp_dim=b_dim, rank=self.r),
        }
        latent_bias, output_bias = self.biases
        if latent_bias:
            specs["bias_a"] = ParameterSpec((self.r,), "bias", self.d_in, tp_dim=0, rank=self.r)
        if output_bias:
            specs["bias_b"] = ParameterSpec((self.d_out,), "bias", self.r, tp_dim=0, rank=self.r)
        return specs

    def moved(self) -> tuple[int, int]:
        """Outputs or latents; backward the adjoint collective."""
        moved = self.d_out if self.splits_r else self.r
        return moved, moved

    def products(self) -> int:
        """The rank's part of the latent, and outputs: sums of whole width where they are still to be made."""
        out = self.d_out if self.splits_r else self.d_out // self.tp_size
        return self.r // self.tp_size + out

    @staticmethod
    def before(members: Members, x: torch.Tensor, ops: Operations) -> Sequence[torch.Tensor]:
        """(..., d_in) -> the outputs, (..., T, d_out/T) partial sums of them, or the latents (..., r/T)."""
        if members[0][0].collective == "gather":
            return [ops.linear(x, p["w_a"], p.get("bias_a")) for _, p in members]
        return LowDimInput.before_folded(members, x, ops, None, None)

    @staticmethod
    def before_folded(
        members: Members, x: torch.Tensor, ops: Operations, norm: Any, rotary: Any
    ) -> Sequence[torch.Tensor]:
        """No collective comes between the two products, so one kernel can do both, of all members."""
        size = members[0][0].tp_size
        # Sums that are still to be made get the output's bias afterwards, once.
        pairs = [
            (p["w_a"], p["w_b"], p.get("bias_a"), p.get("bias_b") if size == 1 else None) for _, p in members
        ]
        outputs = ops.lowdim_linears(x, pairs, norm, rotary)
        return outputs if size == 1 else [y.unflatten(-1, (size, -1)) for y in outputs]

    def after(self, y: torch.Tensor, p: Parameters, ops: Operations) -> torch.Tensor:
        """The sums are the output; latents (..., T, r/T) go through W_B to (..., d_out/T)."""
        if self.splits_r:
            return y if "bias_b" not in p else y + p["bias_b"].to(y.dtype)
        return ops.linear(y.flatten(-2), p["w_b"], p.get("bias_b"))


class LowDimOutput(_LowDim, OutputStructure):
    """Output side in either layout.

    ``column_row`` splits W_B along r; ``latent`` keeps W_B whole on every rank, which costs its memory and
    product T times and saves the all-reduce of the output.
    """

    def specs(self) -> dict[str, ParameterSpec]:
        """``w_a`` (r, d_in), ``w_b`` (d_out, r), ``bias_a`` (r,), ``bias_b`` (d_out,)."""
        a_dim, b_dim = (0, 1) if self.splits_r else (None, None)
        specs = {
            "w_a": ParameterSpec((self.r, self.d_in), "output", self.d_in, tp_dim=1, rank=self.r),
            "w_b": ParameterSpec((self.d_out, self.r), "output", self.r, tp_dim=b_dim, rank=self.r),
        }
        latent_bias, output_bias = self.biases
        if latent_bias:
            specs["bias_a"] = ParameterSpec((self.r,), "bias", self.d_in, tp_dim=a_dim, rank=self.r)
        if output_bias:
            specs["bias_b"] = ParameterSpec((self.d_out,), "bias", self.r, rank=self.r)
        return specs

    def moved(self) -> tuple[int, int]:
        """``column_row`` gathers the latent's gradient in backward; ``latent`` moves nothing there."""
        return (self.r + 2 * self.d_out, self.r) if self.splits_r else (2 * self.r, 0)

    def products(self) -> int:
        """Sums of latents of whole width, and the output."""
        return self.r + self.d_out

    def apply(self, x: torch.Tensor, p: Parameters, ops: Operations) -> torch.Tensor:
        """(..., d_in/T) -> (..., d_out)"""
        if self.tp_size == 1:
            return ops.lowdim_linears(x, [(p["w_a"], p["w_b"], p.get("bias_a"), p.get("bias_b"))])[0]
        latent = ops.linear(x, p["w_a"], None)
        if self.splits_r:
            latent = ops.reduce_scatter_shards(latent.unflatten(-1, (self.tp_size, -1)))
        else:
            latent = ops.reduce_from_tp(latent)
        latent = latent if "bias_a" not in p else latent + p["bias_a"].to(latent.dtype)
        if not self.splits_r:
            return ops.linear(latent, p["w_b"], p.get("bias_b"))
        y = ops.reduce_from_tp(ops.linear(latent, p["w_b"], None))
        return y if "bias_b" not in p else y + p["bias_b"].to(y.dtype)
