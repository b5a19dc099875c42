"""The low-dimensional product ``z = (x W_A^T + b_A) W_B^T + b_B`` (paper, Section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_lpa.ops import elementwise as separate
from megatron_lpa.ops.dispatch import Case, Plan, choose
from megatron_lpa.ops.linear import autocast_dtype, linear
from megatron_lpa.ops.lowdim_direct import lowdim
from megatron_lpa.ops.lowdim_math import merge
from megatron_lpa.ops.lowdim_op import Arguments


class Pair(NamedTuple):
    """The factors of one low-dimensional module.

    Args:
        w_a: (r, d_in).
        w_b: (d_out, r).
        bias_a: (r,) or None.
        bias_b: (d_out,) or None.
    """

    w_a: torch.Tensor
    w_b: torch.Tensor
    bias_a: torch.Tensor | None = None
    bias_b: torch.Tensor | None = None


class Norm(NamedTuple):
    """An RMSNorm of x before the product.

    Args:
        weight: (d_in,).
        eps: added to the mean square.
    """

    weight: torch.Tensor
    eps: float


class Rotary(NamedTuple):
    """Rotary embedding of the first two outputs, q and k, after the product.

    Args:
        cos: (S, E) fp32 for x of (..., S, d_in), the second half of E repeating the first (``layers.attention.rope_tables``).
        sin: the same of sines.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def lowdim_linear(
    x: torch.Tensor,
    w_a: torch.Tensor,
    w_b: torch.Tensor,
    bias_a: torch.Tensor | None = None,
    bias_b: torch.Tensor | None = None,
    path: str = "auto",
) -> torch.Tensor:
    """Both products of a low-dimensional module.

    Args:
        x: (..., d_in).
        w_a: (r, d_in).
        w_b: (d_out, r).
        bias_a: (r,) or None.
        bias_b: (d_out,) or None.
        path: one of ``dispatch.PATHS``; ``auto`` takes what was measured to be fastest.

    Returns:
        (..., d_out), in the dtype of ``x``.

    Raises:
        UserError: a path that does not exist or cannot run here.
    """
    return lowdim_linears(x, [Pair(w_a, w_b, bias_a, bias_b)], path=path)[0]


def lowdim_linears(
    x: torch.Tensor,
    pairs: Sequence[Pair],
    norm: Norm | None = None,
    path: str = "auto",
    elementwise: str = "eager",
    rotary: Rotary | None = None,
) -> tuple[torch.Tensor, ...]:
    """Several low-dimensional modules of one x, such as q, k and v.

    Args:
        x: (..., d_in).
        pairs: factors of each module; ranks and output widths may differ.
        norm: an RMSNorm before all of them. ``fused`` folds it into the kernel, except in fp16, whose range an x
            without its norm can leave. The other paths compute it before: without the kernel, scaling latents and
            gradients would be as many passes over memory as the norm is.
        path: as in ``lowdim_linear``.
        elementwise: what computes the norm and the rotation where they are not folded, and turns gradients back; one
            of ``elementwise.BACKENDS``.
        rotary: rotation of the heads of the first two outputs, which ``fused`` does before it writes them.

    Returns:
        (..., d_out) of each pair.

    Raises:
        UserError: a path that does not exist or cannot run here.
    """
    tensors = [x, *(t for pair in pairs for t in pair if t is not None)]
    if norm is not None:
        tensors.append(norm.weight)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dtype = autocast_dtype(x)
    case = Case(
        dtype,
        pairs[0].w_a.shape[1],  # of a parameter, whose shape torch.compile never leaves open
        tuple(pair.w_a.shape[0] for pair in pairs),
        tuple(pair.w_b.shape[0] for pair in pairs),
        norm is not None,
        training,
        rotary is not None,
    )
    plan = choose(path, case, x.shape[:-1].numel(), x.device)
    return lowdim_by_plan(x, pairs, norm, plan, training, elementwise, rotary)


def lowdim_by_plan(
    x: torch.Tensor,
    pairs: Sequence[Pair],
    norm: Norm | None,
    plan: Plan,
    training: bool,
    elementwise: str = "eager",
    rotary: Rotary | None = None,
) -> tuple[torch.Tensor, ...]:
    """What ``lowdim_linears`` does once it has chosen: models and benchmarks run the same code.

    Args:
        x, pairs, norm, elementwise, rotary: as in ``lowdim_linears``.
        plan: a path and its tiles. A norm is folded into ``fused``, also where the plan has no tile for a direction;
            rotation only where the kernel computes the outputs.
        training: whether a backward pass follows.
    """
    assert rotary is None or rotary.cos.shape[0] == x.shape[-2], (rotary.cos.shape, x.shape)
    if rotary is not None and not plan.forward_tile:
        q, k, *others = lowdim_by_plan(x, pairs, norm, plan, training, elementwise)
        return (*separate.rotate_rows(q, k, *rotary, elementwise), *others)
    dtype = autocast_dtype(x)
    # The kernel takes x and the norm in one precision; under autocast the residual stream has more than the products.
    if norm is not None and (plan.path != "fused" or dtype == torch.float16 or x.dtype != dtype):
        x, norm = separate.rms_norm(x, norm.weight, norm.eps, elementwise), None
    if norm is None:
        x = x.to(dtype)
    if plan.path == "eager":
        return tuple(linear(linear(x, pair.w_a, pair.bias_a), pair.w_b, pair.bias_b) for pair in pairs)
    if plan.path == "merged":
        return tuple(linear(x, *merge(*pair)) for pair in pairs)
    return _registered(
        x.to(dtype), [_cast(pair, dtype) for pair in pairs], norm, plan, training, elementwise, rotary
    )


def _registered(
    x: torch.Tensor,
    pairs: Sequence[Pair],
    norm: Norm | None,
    plan: Plan,
    training: bool,
    elementwise: str,
    rotary: Rotary | None,
) -> tuple[torch.Tensor, ...]:
    """The registered operator, by joined products or with the plan's tiles; all tensors have one dtype."""
    bias_a: torch.Tensor | None = None
    if any(pair.bias_a is not None for pair in pairs):
        full = [p.w_a.new_zeros(p.w_a.shape[0]) if p.bias_a is None else p.bias_a for p in pairs]
        bias_a = full[0] if len(full) == 1 else torch.cat(full)
    bias_b: list[torch.Tensor] = []
    if any(pair.bias_b is not None for pair in pairs):
        bias_b = [p.w_b.new_zeros(p.w_b.shape[0]) if p.bias_b is None else p.bias_b for p in pairs]
    weight, eps = (None, 0.0) if norm is None else (norm.weight.to(x.dtype), norm.eps)
    cos, sin = (None, None) if rotary is None else rotary
    arguments = Arguments(
        x, [pair.w_a for pair in pairs], [pair.w_b for pair in pairs], bias_a, bias_b,
        weight, eps, training, plan.forward_tile, plan.backward_tile, cos, sin, elementwise,
    )  # fmt: skip
    return tuple(lowdim(arguments))


def _cast(pair: Pair, dtype: torch.dtype) -> Pair:
    return Pair(*(None if t is None else t.to(dtype) for t in pair))  # type: ignore[arg-type]
