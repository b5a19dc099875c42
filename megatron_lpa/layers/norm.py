"""Normalisation over the hidden size; parameters are replicated over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_lpa.config import ModelConfig
from megatron_lpa.ops.lowdim import Norm
from megatron_lpa.parallel.sharding import ParameterSpec, new_parameter


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(ParameterSpec((width,), "norm_weight", width), 1)
        self.bias = new_parameter(ParameterSpec((width,), "norm_bias", width), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)"""
        return functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(ParameterSpec((width,), "norm_weight", width), 1)

    @property
    def folded(self) -> Norm:
        """What a product needs in order to compute this norm itself."""
        return Norm(self.weight, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)"""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def build_norm(model: ModelConfig) -> nn.Module:
    """The norm that ``model.norm`` asks for."""
    return (LayerNorm if model.norm == "layernorm" else RMSNorm)(model.hidden_size, model.norm_eps)
