"""Normalisation over the hidden size; parameters are replicated over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.ops import elementwise
from megatron_lpa.ops.products import Norm
from megatron_lpa.parallel.sharding import ParameterSpec, new_parameter


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis."""

    def __init__(self, width: int, eps: float, backend: str = "eager") -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = new_parameter(ParameterSpec((width,), "norm_weight", width), 1)
        self.bias = new_parameter(ParameterSpec((width,), "norm_bias", width), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)"""
        return elementwise.layer_norm(x, self.weight, self.bias, self.eps, self.backend)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""

    def __init__(self, width: int, eps: float, backend: str = "eager") -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = new_parameter(ParameterSpec((width,), "norm_weight", width), 1)

    @property
    def folded(self) -> Norm:
        """What a product needs in order to compute this norm itself."""
        return Norm(self.weight, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)"""
        return elementwise.rms_norm(x, self.weight, self.eps, self.backend)


def build_norm(model: ModelConfig, kernels: KernelConfig) -> nn.Module:
    """The norm that ``model.norm`` asks for."""
    kind = LayerNorm if model.norm == "layernorm" else RMSNorm
    return kind(model.hidden_size, model.norm_eps, kernels.elementwise)
