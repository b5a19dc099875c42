"""Matrix products as the layers need them."""

from __future__ import annotations

import torch
from torch.nn import functional


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x weight^T + bias``, (..., d_in) -> (..., d_out).

    A bias goes with rows of a matrix. DeepSpeed's ZeRO-3 puts its own function in place of ``functional.linear``, for
    the rest of the process; for more than two axes that one adds the bias in place to the product, and selective
    checkpointing, which keeps the product, would add it again without noticing.
    """
    if bias is None:
        return functional.linear(x, weight)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return functional.linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """What autocast makes of x in a matrix product: it leaves fp64 alone."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
