"""Causal self-attention with grouped queries; heads are split over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.layers.linear import InputProjections, OutputProjection
from megatron_lpa.ops.attention import causal_attention
from megatron_lpa.ops.elementwise import rotate
from megatron_lpa.ops.products import Norm, Rotary
from megatron_lpa.parallel.groups import ParallelGroups


def rope_tables(
    length: int, head_dim: int, base: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding (RoFormer, eq. 34; half rotation), fp32.

    Returns:
        Two tensors (length, head_dim), positions 0 to length - 1.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), base**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


class Attention(nn.Module):
    """Projections q, k, v, scaled dot-product attention, projection o.

    Args:
        model: the layer's config.
        groups: process groups; H and K are divisible by ``tp_size``.
        layout: tensor-parallel layout of low-dimensional modules.
        kernels: what computes products, rotation and attention.
    """

    def __init__(
        self, model: ModelConfig, groups: ParallelGroups, layout: str, kernels: KernelConfig
    ) -> None:
        super().__init__()
        self.head_dim = model.head_width
        self.kernels = kernels
        self.qkv = InputProjections(("q", "k", "v"), model, groups, layout, kernels)
        self.o = OutputProjection("o", model, groups, layout, kernels)

    @property
    def foldable(self) -> bool:
        """Whether ``forward`` can be given the norm before it."""
        return self.qkv.foldable

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None, norm: Norm | None = None
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D).

        Args:
            x: the residual stream.
            rope: the tables of ``rope_tables``, or None.
            norm: an RMSNorm of ``x`` before everything; only where ``foldable``.
        """
        folded = None if rope is None or not self.foldable else Rotary(*rope)
        # (B, S, heads/T * E) -> (B, S, heads/T, E)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x, norm, folded))
        if rope is not None and folded is None:
            q, k = rotate(q, k, *rope, self.kernels.elementwise)
        return self.o(causal_attention(q, k, v, self.kernels.attention).flatten(-2))
