"""The low-dimensional product of several pairs that read one x, as plain matrix products.

Joined: the first factors lie one below the other, so one product reads x for all pairs, and one product
writes the gradient of x. Separate pairs read x once each and add their gradients in extra passes. Second
factors stay separate. The same functions finish the fused kernel's backward pass: weights' gradients are
products over tokens.

With an RMSNorm before, ``u = x * s * g`` with ``s = 1 / sqrt(mean(x^2) + eps)`` per row and weight ``g``:

    L  = u W_A^T + b_A = s * (x F^T) + b_A,   F = W_A * g (columns)
    dF = (s * dL)^T x,   dW_A = dF * g,   dg = sum over r of dF * W_A
    dx = (s * dL) F - x * s^2 / d * sum over r of dL * (L - b_A)

so neither u nor its gradient is ever written, and the row sum runs over r columns instead of d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional


class Saved(NamedTuple):
    """What a forward pass leaves for backward.

    Args:
        latent: (M, sum of r) in x's dtype; (0,) if not kept.
        rstd: (M,) s of the norm, fp32 or fp64; (0,) without a norm.
    """

    latent: torch.Tensor
    rstd: torch.Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a norm is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def join_first(w_a: Sequence[torch.Tensor], norm_weight: torch.Tensor | None) -> torch.Tensor:
    """F: (sum of r, d_in). One pair without a norm is not copied."""
    joined = w_a[0] if len(w_a) == 1 else torch.cat(list(w_a))
    return joined if norm_weight is None else (joined * norm_weight).to(joined.dtype)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(M, d) -> (M,): 1 / sqrt(mean(x^2) + eps), one read of x."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=wide(x.dtype))
    return (norms.square() / x.shape[-1] + eps).rsqrt()


def scale_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(M, n) * (M,), computed in the scale's dtype and rounded to x's."""
    return (x * scale.unsqueeze(-1)).to(x.dtype)


def split_ranks(joined: torch.Tensor, w_b: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """(M, sum of r) -> one (M, r) per pair, as views."""
    return joined.split([w.shape[1] for w in w_b], dim=-1)


def forward(
    x: torch.Tensor,
    w_a: Sequence[torch.Tensor],
    w_b: Sequence[torch.Tensor],
    bias_a: torch.Tensor | None,
    bias_b: Sequence[torch.Tensor | None],
    norm_weight: torch.Tensor | None,
    eps: float,
) -> tuple[list[torch.Tensor], Saved]:
    """``z_p``: (M, d_out_p) of each pair.

    Args:
        x: (M, d_in).
        w_a: matrices (r_p, d_in).
        w_b: matrices (d_out_p, r_p).
        bias_a: (sum of r,) or None.
        bias_b: (d_out_p,) or None each.
        norm_weight: (d_in,), or None for no norm.
        eps: of the norm.
    """
    first = join_first(w_a, norm_weight)
    if norm_weight is None:
        latent, rstd = functional.linear(x, first, bias_a), x.new_empty(0, dtype=wide(x.dtype))
    else:
        rstd = inverse_rms(x, eps)
        latent = scale_rows(functional.linear(x, first), rstd)
        if bias_a is not None:
            latent = latent + bias_a
    parts = split_ranks(latent, w_b)
    z = [functional.linear(part, w, b) for part, w, b in zip(parts, w_b, bias_b, strict=True)]
    return z, Saved(latent, rstd)


def latent_gradient(
    dz: Sequence[torch.Tensor], w_b: Sequence[torch.Tensor], rstd: torch.Tensor | None
) -> torch.Tensor:
    """dL: (M, sum of r), times s with a norm."""
    joined = dz[0].new_empty((dz[0].shape[0], sum(w.shape[1] for w in w_b)))
    for part, g, w in zip(split_ranks(joined, w_b), dz, w_b, strict=True):
        torch.mm(g, w, out=part)  # each product writes into its columns: nothing to join afterwards
    return joined if rstd is None else scale_rows(joined, rstd)


def input_gradient(
    scaled: torch.Tensor,
    first: torch.Tensor,
    x: torch.Tensor,
    saved: Saved,
    bias_a: torch.Tensor | None,
    has_norm: bool,
) -> torch.Tensor:
    """dx: (M, d_in), from what ``latent_gradient`` returned."""
    dx = scaled @ first
    if not has_norm:
        return dx
    normed = saved.latent if bias_a is None else saved.latent - bias_a
    # ``scaled`` holds one s already; the other makes s^2.
    row_sums = (scaled.to(saved.rstd.dtype) * normed).sum(dim=-1) * saved.rstd
    return torch.addcmul(dx, x, (row_sums / x.shape[-1]).to(x.dtype).unsqueeze(-1), value=-1)


class Needed(NamedTuple):
    """Which gradients are asked for; of lists, whether any is."""

    x: bool
    w_a: bool
    w_b: bool
    bias_a: bool
    bias_b: bool
    norm_weight: bool

    @property
    def first(self) -> bool:
        """Whether the first factors' product over tokens is; the norm's gradient comes from it, too."""
        return self.w_a or self.norm_weight


class WeightGradients(NamedTuple):
    """Gradients in the order of the factors; empty tensors where none was asked for.

    Args:
        w_a: (sum of r, d_in).
        bias_a: (sum of r,).
        norm_weight: (d_in,).
        w_b: (d_out_p, r_p) each.
        bias_b: (d_out_p,) each, or an empty list.
    """

    w_a: torch.Tensor
    bias_a: torch.Tensor
    norm_weight: torch.Tensor
    w_b: list[torch.Tensor]
    bias_b: list[torch.Tensor]


def weight_gradients(
    dz: Sequence[torch.Tensor],
    scaled: torch.Tensor,
    x: torch.Tensor,
    saved: Saved,
    w_a: Sequence[torch.Tensor],
    w_b: Sequence[torch.Tensor],
    norm_weight: torch.Tensor | None,
    need: Needed,
) -> WeightGradients:
    """Products over tokens. ``scaled`` is what ``latent_gradient`` returned."""
    empty = x.new_empty
    folded = scaled.T @ x if need.first else empty(0)
    d_norm = empty(0)
    if need.first and norm_weight is not None:
        joined = join_first(w_a, None)
        d_norm = (folded.to(wide(x.dtype)) * joined).sum(dim=0).to(norm_weight.dtype)
        folded = (folded * norm_weight).to(x.dtype)
    d_bias_a = empty(0)
    if need.bias_a:
        unscaled = scaled if norm_weight is None else scaled / saved.rstd.unsqueeze(-1)
        d_bias_a = unscaled.sum(dim=0, dtype=wide(x.dtype)).to(x.dtype)
    parts = split_ranks(saved.latent, w_b) if need.w_b else ()
    d_w_b = [g.T @ part for g, part in zip(dz, parts, strict=True)] if need.w_b else [empty(0) for _ in dz]
    d_bias_b = [g.sum(dim=0) for g in dz if need.bias_b]
    return WeightGradients(folded, d_bias_a, d_norm, d_w_b, d_bias_b)
