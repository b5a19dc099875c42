"""Feed-forward sublayer; its columns are split over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.layers.linear import InputProjections, OutputProjection
from megatron_lpa.ops.elementwise import swiglu
from megatron_lpa.ops.products import Norm
from megatron_lpa.parallel.groups import ParallelGroups


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or ``down(silu(gate(x)) * up(x))`` for SwiGLU (arXiv 2002.05202)."""

    def __init__(
        self, model: ModelConfig, groups: ParallelGroups, layout: str, kernels: KernelConfig
    ) -> None:
        super().__init__()
        self.activation, self.backend = model.activation, kernels.elementwise
        names = ("gate", "up") if model.activation == "swiglu" else ("up",)
        self.inputs = InputProjections(names, model, groups, layout, kernels)
        self.down = OutputProjection("down", model, groups, layout, kernels)

    @property
    def foldable(self) -> bool:
        """Whether ``forward`` can be given the norm before it."""
        return self.inputs.foldable

    def forward(self, x: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """(B, S, D) -> (B, S, D); ``norm`` is an RMSNorm of ``x`` before everything, where ``foldable``."""
        if self.activation == "swiglu":
            gate, up = self.inputs(x, norm)
            return self.down(swiglu(gate, up, self.backend))
        (up,) = self.inputs(x, norm)
        if self.activation == "relu":
            return self.down(functional.relu(up))
        return self.down(
            functional.gelu(up, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        )
