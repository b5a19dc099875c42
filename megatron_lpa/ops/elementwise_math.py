"""The formulas that ``ops/elementwise.py`` gives to torch.compile: functions of tensors, without autograd.

M is the number of rows. Every function computes in fp32, or fp64 for fp64, and rounds its results once.
"""

from __future__ import annotations

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype that is computed in."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, D), (D,) -> the normed x (M, D), and 1/rms (M,) in fp32."""
    h = wide(x)
    rstd = torch.rsqrt((h * h).mean(-1) + eps)
    return (h * rstd.unsqueeze(-1) * wide(weight)).to(x.dtype), rstd


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (M, D) and of the weight (D,)."""
    rstd = rstd.unsqueeze(-1)
    g, normed = wide(dy), wide(x) * rstd
    scaled = g * wide(weight)
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (g * normed).sum(0).to(weight.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M, D), (D,), (D,) -> the normed x (M, D), and mean and 1/deviation (M,) in fp32."""
    h = wide(x)
    mean = h.mean(-1)
    centred = h - mean.unsqueeze(-1)  # before squaring: E[x^2] - E[x]^2 cancels where the mean is large
    rstd = torch.rsqrt((centred * centred).mean(-1) + eps)
    return (centred * rstd.unsqueeze(-1) * wide(weight) + wide(bias)).to(x.dtype), mean, rstd


def layer_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (M, D), of the weight (D,) and of the bias (D,)."""
    rstd = rstd.unsqueeze(-1)
    g, normed = wide(dy), (wide(x) - mean.unsqueeze(-1)) * rstd
    scaled = g * wide(weight)
    along = (scaled * normed).mean(-1, keepdim=True)
    dx = rstd * (scaled - scaled.mean(-1, keepdim=True) - normed * along)
    return dx.to(x.dtype), (g * normed).sum(0).to(weight.dtype), g.sum(0).to(weight.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(M, F) twice -> (M, F)"""
    g = wide(gate)
    return (g * torch.sigmoid(g) * wide(up)).to(gate.dtype)


def swiglu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, (M, F) each."""
    d, g = wide(dy), wide(gate)
    s = torch.sigmoid(g)
    dgate = d * wide(up) * s * (1 + g * (1 - s))
    return dgate.to(gate.dtype), (d * g * s).to(up.dtype)


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, H, E), (B, S, K, E), tables (S, E) -> q and k rotated."""
    half = q.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    return _rotate(q, c, s), _rotate(k, c, s)


def rotate_back(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse and adjoint of ``rotate``."""
    half = q.shape[-1] // 2
    c, s = cos[:, None, :half], -sin[:, None, :half]
    return _rotate(q, c, s), _rotate(k, c, s)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = wide(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def shard_statistics(
    scores: torch.Tensor, local: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a row's cross-entropy needs of this rank's logits.

    Args:
        scores: (M, W) logits.
        local: (M,) int64, the label's column, or -1 where it is not among these columns.

    Returns:
        (M,) each in fp32: the largest logit, the sum of ``exp(logit - largest)``, the label's logit (0 for -1).
    """
    h = wide(scores)
    largest = h.amax(-1)
    total = torch.exp(h - largest.unsqueeze(-1)).sum(-1)
    return largest, total, label_logits(scores, local)


def label_logits(scores: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The third of ``shard_statistics``: (M, W), (M,) -> (M,)"""
    target = wide(scores.gather(-1, local.clamp(min=0).unsqueeze(-1)).squeeze(-1))
    return torch.where(local < 0, 0.0, target)


def shard_gradient(
    scores: torch.Tensor,
    local: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    upstream: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the loss by this rank's logits, (M, W): ``(softmax - one-hot) * upstream``.

    Args:
        scores: (M, W) logits.
        local: (M,), as above.
        largest: (M,) over all ranks.
        total: (M,) over all ranks, of ``exp(logit - largest)``.
        upstream: (M,).
    """
    softmax = torch.exp(wide(scores) - largest.unsqueeze(-1)) / total.unsqueeze(-1)
    columns = torch.arange(scores.shape[-1], device=scores.device)
    hit = columns == local.unsqueeze(-1)
    return ((softmax - hit.to(softmax.dtype)) * upstream.unsqueeze(-1)).to(scores.dtype)
