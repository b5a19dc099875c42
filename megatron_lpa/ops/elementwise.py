"""Norms, rotary embedding and gated activations: operations whose time is the memory that they read and
write.

Backends:

* ``eager``: PyTorch's operations, as written in a formula.
* ``compiled``: each function, and its gradient, is one small graph for torch.compile. fp32 inside (fp64 for
  fp64).
* ``liger``: the Triton functions of the package liger-kernel, on a GPU.
* ``auto``: ``compiled`` on a GPU, ``eager`` on a CPU. That this is the faster choice is not measured yet.

The compiled graphs stand inside autograd functions instead of being differentiated by the compiler. So they
see plain tensors without gradients: whether one trains, evaluates or recomputes changes no guard, and what is
kept for backward is written down here. The number of rows is marked as dynamic; widths and dtypes are fixed
by a model. A training run with evaluation therefore compiles every graph once (and again for a single row).

ReLU and GELU are one kernel forward and one backward in PyTorch already. They need no backend.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_lpa.errors import UserError

HALF = (torch.bfloat16, torch.float16)
BACKENDS = ("auto", "eager", "compiled", "liger")


def resolve(backend: str, x: torch.Tensor) -> str:
    """The backend that computes on ``x``: ``eager``, ``compiled`` or ``liger``.

    Inside a graph that torch.compile traces, ``compiled`` is ``eager``: the outer graph fuses by itself.

    Raises:
        UserError: ``liger`` without the package or without a GPU.
    """
    assert backend in BACKENDS, backend
    if backend == "auto":
        backend = "compiled" if x.is_cuda else "eager"
    if backend == "compiled" and torch.compiler.is_compiling():
        return "eager"
    if backend == "liger":
        _check_liger(x.device.type)
    return backend


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, (..., D) with weight (D,), in the dtype of
    x.

    Under autocast in fp32.

    Raises:
        UserError: as ``resolve``.
    """
    chosen, x = resolve(backend, x), _norm_input(x)
    if chosen == "compiled":
        return _RMSNorm.apply(x, weight, eps)
    if chosen == "liger":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # gemma: everything in fp32, as PyTorch does. Not in place: the gradient of a sum is shared by its
        # parts.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, backend: str
) -> torch.Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis, (..., D), in the dtype of x.

    Under autocast in fp32.

    Raises:
        UserError: as ``resolve``.
    """
    chosen, x = resolve(backend, x), _norm_input(x)
    if chosen == "compiled":
        return _LayerNorm.apply(x, weight, bias, eps)
    if chosen == "liger":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(x, weight, bias, eps)
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _norm_input(x: torch.Tensor) -> torch.Tensor:
    """Autocast computes norms in fp32 and leaves the result so; PyTorch's own does that on a GPU, and not on
    a CPU."""
    return x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype in HALF else x


def swiglu(gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
    """``silu(gate) * up``, elementwise, (..., F) each.

    ``compiled`` and ``liger`` keep gate and up for backward and nothing else; ``eager`` keeps silu(gate) too.

    Raises:
        UserError: as ``resolve``.
    """
    chosen = resolve(backend, gate)
    if chosen == "compiled":
        return _SwiGLU.apply(gate, up)
    if chosen == "liger":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)
    return functional.silu(gate) * up


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of queries and keys (half rotation: the first half of E is paired with the second).

    ``liger`` computes as ``compiled`` does: its own function writes the result over q and k, which selective
    checkpointing keeps and would rotate twice.

    Args:
        q: (B, S, H, E).
        k: (B, S, K, E).
        cos: (S, E), fp32; row s belongs to position s. The second half of E repeats the first.
        sin: the same of sines.
        backend: one of ``BACKENDS``.

    Returns:
        q and k rotated, in their dtypes and layouts.

    Raises:
        UserError: as ``resolve``.
    """
    if resolve(backend, q) == "eager":
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    return _Rotate.apply(q, k, cos, sin)


def rotate_rows(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: str, back: bool = False
) -> list[torch.Tensor]:
    """``rotate`` where heads are not an axis of their own yet.

    Args:
        q: (..., S, H * E).
        k: (..., S, K * E).
        cos, sin, backend: as in ``rotate``.
        back: rotate the other way, which is also the gradient.

    Returns:
        q and k rotated, in their dtypes and shapes.
    """
    length, width = cos.shape
    q_heads, k_heads = (t.reshape(t.shape[:-2].numel(), length, t.shape[-1] // width, width) for t in (q, k))
    turned = rotate(q_heads, k_heads, cos, -sin if back else sin, backend)
    return [z.reshape(t.shape) for z, t in zip(turned, (q, k), strict=True)]


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate (..., E) by tables that broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)


@functools.cache
def _check_liger(device_type: str) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "kernels.elementwise=liger needs the package liger-kernel: pip install 'megatron_lpa[gpu]', or "
            "set kernels.elementwise=auto"
        )
    if device_type != "cuda":
        raise UserError(
            f"kernels.elementwise=liger needs a GPU, but the model is on {device_type}; set "
            "kernels.elementwise=auto"
        )


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through torch.compile. Made at first use: importing the compiler takes seconds."""
    return torch.compile(function)


def dynamic(x: torch.Tensor, *axes: int) -> torch.Tensor:
    """``x`` outside autograd, with axes whose sizes must not be compiled in."""
    x = x.detach()
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(x, axis)
    return x


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (M, D), a view wherever the strides allow one; M is dynamic."""
    return dynamic(x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]), 0)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1/rms per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, rstd = compiled(rms_norm_rows)(_rows(x), weight.detach(), eps)
        ctx.save_for_backward(x, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dw = compiled(rms_norm_rows_backward)(_rows(dy), _rows(x), weight.detach(), dynamic(rstd, 0))
        return dx.view(x.shape), dw, None


class _LayerNorm(torch.autograd.Function):
    """Keeps x, and mean and 1/deviation per row."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        y, mean, rstd = compiled(layer_norm_rows)(_rows(x), weight.detach(), bias.detach(), eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dw, db = compiled(layer_norm_rows_backward)(
            _rows(dy), _rows(x), weight.detach(), dynamic(mean, 0), dynamic(rstd, 0)
        )
        return dx.view(x.shape), dw, db, None


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return compiled(swiglu_rows)(_rows(gate), _rows(up)).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = compiled(swiglu_rows_backward)(_rows(dy), _rows(gate), _rows(up))
        return dgate.view(gate.shape), dup.view(up.shape)


class _Rotate(torch.autograd.Function):
    """Keeps the tables only: the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(rotate_heads, q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: torch.Tensor, dk: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        return *_rotated(rotate_heads_back, dq, dk, *ctx.saved_tensors), None, None


def _rotated(
    function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return compiled(function)(dynamic(q, 0, 1), dynamic(k, 0, 1), dynamic(cos, 0), dynamic(sin, 0))


# What is compiled: functions of tensors, without autograd. M is the number of rows. Each computes in fp32, or
# fp64 for fp64, and rounds its results once.


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype that is computed in."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, D), (D,) -> the normed x (M, D), and 1/rms (M,) in fp32."""
    h = wide(x)
    rstd = torch.rsqrt((h * h).mean(-1) + eps)
    return (h * rstd.unsqueeze(-1) * wide(weight)).to(x.dtype), rstd


def rms_norm_rows_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (M, D) and of the weight (D,)."""
    rstd = rstd.unsqueeze(-1)
    g, normed = wide(dy), wide(x) * rstd
    scaled = g * wide(weight)
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (g * normed).sum(0).to(weight.dtype)


def layer_norm_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M, D), (D,), (D,) -> the normed x (M, D), and mean and 1/deviation (M,) in fp32."""
    h = wide(x)
    mean = h.mean(-1)
    centred = h - mean.unsqueeze(-1)  # before squaring: E[x^2] - E[x]^2 cancels where the mean is large
    rstd = torch.rsqrt((centred * centred).mean(-1) + eps)
    return (centred * rstd.unsqueeze(-1) * wide(weight) + wide(bias)).to(x.dtype), mean, rstd


def layer_norm_rows_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (M, D), of the weight (D,) and of the bias (D,)."""
    rstd = rstd.unsqueeze(-1)
    g, normed = wide(dy), (wide(x) - mean.unsqueeze(-1)) * rstd
    scaled = g * wide(weight)
    along = (scaled * normed).mean(-1, keepdim=True)
    dx = rstd * (scaled - scaled.mean(-1, keepdim=True) - normed * along)
    return dx.to(x.dtype), (g * normed).sum(0).to(weight.dtype), g.sum(0).to(weight.dtype)


def swiglu_rows(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(M, F) twice -> (M, F)"""
    g = wide(gate)
    return (g * torch.sigmoid(g) * wide(up)).to(gate.dtype)


def swiglu_rows_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, (M, F) each."""
    d, g = wide(dy), wide(gate)
    s = torch.sigmoid(g)
    dgate = d * wide(up) * s * (1 + g * (1 - s))
    return dgate.to(gate.dtype), (d * g * s).to(up.dtype)


def rotate_heads(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, H, E), (B, S, K, E), tables (S, E) -> q and k rotated."""
    half = q.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    return _rotate_by(q, c, s), _rotate_by(k, c, s)


def rotate_heads_back(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse and adjoint of ``rotate_heads``."""
    half = q.shape[-1] // 2
    c, s = cos[:, None, :half], -sin[:, None, :half]
    return _rotate_by(q, c, s), _rotate_by(k, c, s)


def _rotate_by(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = wide(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
