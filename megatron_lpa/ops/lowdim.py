"""The low-dimensional product ``z = (x W_A^T + b_A) W_B^T + b_B`` (paper, Section 3.1)."""

from __future__ import annotations

import torch
from torch.nn import functional


def lowdim_linear(
    x: torch.Tensor,
    w_a: torch.Tensor,
    w_b: torch.Tensor,
    bias_a: torch.Tensor | None = None,
    bias_b: torch.Tensor | None = None,
) -> torch.Tensor:
    """Both products of a low-dimensional module.

    Args:
        x: (..., d_in).
        w_a: (r, d_in).
        w_b: (d_out, r).
        bias_a: (r,) or None.
        bias_b: (d_out,) or None.

    Returns:
        (..., d_out), in the dtype of ``x``.
    """
    return functional.linear(functional.linear(x, w_a, bias_a), w_b, bias_b)
