"""The low-dimensional product as a registered operator: ``torch.compile`` sees one opaque call with known shapes.

``megatron_lpa::lowdim`` and ``megatron_lpa::lowdim_backward`` compute on the ``joined`` or the ``fused`` path; the
choice is made before, in ``megatron_lpa/ops/dispatch.py``. Lists have one entry per pair. Autocast is handled by
the caller (``ops/lowdim.py``): the operator computes in the dtype that it is given.

Weights are saved as they were passed, not joined: under ZeRO-3 that is the parameter itself, whose storage
DeepSpeed empties after forward and fills again before backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from megatron_lpa.kernels.tiles import Tile
from megatron_lpa.ops import elementwise
from megatron_lpa.ops import lowdim_math as plain
from megatron_lpa.ops.lowdim_math import Saved

Tensors = Sequence[torch.Tensor]
OptionalTensors = Sequence[torch.Tensor | None]


class Arguments(NamedTuple):
    """Those of ``compute`` and of the operator, in their order; described there."""

    x: torch.Tensor
    w_a: Tensors
    w_b: Tensors
    bias_a: torch.Tensor | None
    bias_b: Tensors
    norm_weight: torch.Tensor | None
    norm_eps: float
    keep: bool
    forward_tile: str
    backward_tile: str
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    rotate_back_by: str


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., d) -> (M, d), a view wherever the strides allow one."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 would be ambiguous for zero tokens


def compute(
    x: torch.Tensor,
    w_a: Sequence[torch.Tensor],
    w_b: Sequence[torch.Tensor],
    bias_a: torch.Tensor | None,
    bias_b: Sequence[torch.Tensor],
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    keep: bool,
    forward_tile: str,
    backward_tile: str,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotate_back_by: str,
) -> list[torch.Tensor]:
    """Outputs (..., d_out_p) of each pair, then the latents (M, sum of r) and 1/rms (M,), empty unless ``keep``.

    Args:
        x: (..., d_in).
        w_a: (r_p, d_in).
        w_b: (d_out_p, r_p).
        bias_a: (sum of r,) or None.
        bias_b: (d_out_p,) each, or none at all.
        norm_weight: (d_in,) of an RMSNorm applied to x before, or None.
        norm_eps: its epsilon.
        keep: whether a backward pass follows.
        forward_tile: ``str`` of a ``Tile`` for the fused kernel; empty for matrix products. (A string, because
            PyTorch takes an empty list of numbers for a list of tensors when it checks gradients.)
        backward_tile: the same for the gradient of x.
        cos: (S, E) fp32 with x of (..., S, d_in): rotary embedding of the first two outputs. Only with a
            ``forward_tile``: without the kernel it is a pass of its own in any case.
        sin: the same of sines.
        rotate_back_by: what turns the gradients of the first two outputs back; one of ``elementwise.BACKENDS``.
    """
    assert cos is None or forward_tile
    rows = as_rows(x)
    biases: OptionalTensors = bias_b or [None] * len(w_b)
    with _no_autocast(x):
        if forward_tile:
            from megatron_lpa.kernels import launch  # Triton is optional

            first = plain.join_first(w_a, norm_weight)
            eps = None if norm_weight is None else norm_eps
            rotary = None if cos is None or sin is None else launch.Rotary(cos, sin)
            z, latent, rstd = launch.forward(
                rows, first, w_b, bias_a, biases, Tile.parse(forward_tile), keep, eps, rotary
            )
        else:
            z, (latent, rstd) = plain.forward(rows, w_a, w_b, bias_a, biases, norm_weight, norm_eps)
    if not keep:
        latent, rstd = latent.new_empty(0), rstd.new_empty(0)
    return [*(part.view(*x.shape[:-1], part.shape[-1]) for part in z), latent, rstd]


lowdim_op = torch.library.custom_op("megatron_lpa::lowdim", compute, mutates_args=())


@lowdim_op.register_fake
def _(
    x: torch.Tensor,
    w_a: Tensors,
    w_b: Tensors,
    bias_a: torch.Tensor | None,
    bias_b: Tensors,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    keep: bool,
    forward_tile: str,
    backward_tile: str,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotate_back_by: str,
) -> list[torch.Tensor]:
    tokens = x.shape[:-1].numel()
    z = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in w_b]
    latent = x.new_empty((tokens, sum(w.shape[0] for w in w_a)) if keep else (0,))
    rstd_shape = (tokens,) if keep and norm_weight is not None else (0,)
    return [*z, latent, x.new_empty(rstd_shape, dtype=plain.wide(x.dtype))]


def compute_gradients(
    dz: Sequence[torch.Tensor],
    x: torch.Tensor,
    latent: torch.Tensor,
    rstd: torch.Tensor,
    w_a: Sequence[torch.Tensor],
    w_b: Sequence[torch.Tensor],
    bias_a: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    need_x: bool,
    need_first: bool,
    need_bias_a: bool,
    need_second: bool,
    need_bias_b: bool,
    backward_tile: str,
) -> list[torch.Tensor]:
    """Gradients of x, the joined first factors, joined first biases, the norm's weight, then of each pair's
    second factor, then of each pair's second bias (if any is needed); empty where not needed."""
    rows, grads = as_rows(x), [as_rows(g) for g in dz]
    saved, has_norm = Saved(latent, rstd), norm_weight is not None
    dx = x.new_empty(0)
    with _no_autocast(x):
        if backward_tile and need_x:
            from megatron_lpa.kernels import launch  # Triton is optional

            norm = launch.NormInputs(rows, latent, bias_a, rstd) if has_norm else None
            first = plain.join_first(w_a, norm_weight)
            dx, scaled = launch.input_gradient(grads, first, w_b, Tile.parse(backward_tile), norm)
        else:
            scaled = plain.latent_gradient(grads, w_b, rstd if has_norm else None)
            if need_x:
                first = plain.join_first(w_a, norm_weight)
                dx = plain.input_gradient(scaled, first, rows, saved, bias_a, has_norm)
        weights = plain.weight_gradients(
            grads, scaled, rows, saved, w_a, w_b, norm_weight, need_first, need_bias_a, need_second, need_bias_b
        )  # fmt: skip
    dx = dx.view(x.shape) if need_x else dx
    return [dx, weights.w_a, weights.bias_a, weights.norm_weight, *weights.w_b, *weights.bias_b]


lowdim_backward_op = torch.library.custom_op(
    "megatron_lpa::lowdim_backward", compute_gradients, mutates_args=()
)


@lowdim_backward_op.register_fake
def _(
    dz: Tensors,
    x: torch.Tensor,
    latent: torch.Tensor,
    rstd: torch.Tensor,
    w_a: Tensors,
    w_b: Tensors,
    bias_a: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    need_x: bool,
    need_first: bool,
    need_bias_a: bool,
    need_second: bool,
    need_bias_b: bool,
    backward_tile: str,
) -> list[torch.Tensor]:
    ranks, empty = sum(w.shape[0] for w in w_a), x.new_empty
    norm_gradient = need_first and norm_weight is not None
    d_norm = (
        norm_weight.new_empty(norm_weight.shape) if norm_weight is not None and norm_gradient else empty(0)
    )
    return [
        empty(x.shape if need_x else (0,)),
        empty((ranks, x.shape[-1]) if need_first else (0,)),
        empty((ranks,) if need_bias_a else (0,)),
        d_norm,
        *(empty(w.shape if need_second else (0,)) for w in w_b),
        *(empty(w.shape[0]) for w in w_b if need_bias_b),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    save_for_backward(ctx, Arguments(*inputs), output)


def save_for_backward(ctx: Any, a: Arguments, output: Tensors) -> None:
    """What ``gradients_of`` needs of the arguments and of what ``compute`` returned."""
    assert a.keep, "the caller says keep=True wherever a gradient can be asked for"
    ctx.pairs, ctx.biases_b, ctx.backward_tile = len(a.w_a), len(a.bias_b), a.backward_tile
    ctx.rotate_back_by = a.rotate_back_by
    ctx.save_for_backward(a.x, *a.w_a, *a.w_b, a.bias_a, a.norm_weight, a.cos, a.sin, *output[-2:])
    ctx.set_materialize_grads(False)


class Needed(NamedTuple):
    """Which gradients are asked for; of lists, whether any is."""

    x: bool
    w_a: bool
    w_b: bool
    bias_a: bool
    bias_b: bool
    norm: bool


class Gradients(NamedTuple):
    """Of the inputs of ``lowdim_op``; None where none was asked for."""

    x: torch.Tensor | None
    w_a: list[torch.Tensor | None]
    w_b: list[torch.Tensor | None]
    bias_a: torch.Tensor | None
    bias_b: list[torch.Tensor | None]
    norm: torch.Tensor | None


def gradients_of(
    ctx: Any,
    grads: Sequence[torch.Tensor | None],
    need: Needed,
    backward: Callable[..., list[torch.Tensor]],
) -> Gradients:
    """From what ``save_for_backward`` kept, by the operator or by the function inside it."""
    x, *factors, bias_a, norm_weight, cos, sin, latent, rstd = ctx.saved_tensors
    n = ctx.pairs
    w_a, w_b = factors[:n], factors[n:]
    dz = [
        x.new_zeros((*x.shape[:-1], w.shape[0])) if g is None else g
        for g, w in zip(grads[:n], w_b, strict=True)
    ]
    if cos is not None:
        dz[:2] = elementwise.rotate_rows(dz[0], dz[1], cos, sin, ctx.rotate_back_by, back=True)
    dx, d_first, d_bias_a, d_norm, *seconds = backward(
        dz, x, latent, rstd, w_a, w_b, bias_a, norm_weight,
        need.x, need.w_a or need.norm, need.bias_a, need.w_b, need.bias_b, ctx.backward_tile,
    )  # fmt: skip
    nothing: list[torch.Tensor | None] = [None] * n
    return Gradients(
        dx if need.x else None,
        # Views of one product, made here because an operator's outputs may not share memory.
        list(d_first.split([w.shape[0] for w in w_a])) if need.w_a else nothing,
        list(seconds[:n]) if need.w_b else nothing,
        d_bias_a if need.bias_a else None,
        list(seconds[n:]) if need.bias_b else [None] * ctx.biases_b,
        d_norm if need.norm else None,
    )


def _backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    need = Needed(*map(_any, ctx.needs_input_grad[:6]))
    return (*gradients_of(ctx, grads, need, lowdim_backward_op), *[None] * 7)


lowdim_op.register_autograd(_backward, setup_context=_setup_context)


def _any(needed: Any) -> bool:
    return any(needed) if isinstance(needed, (list, tuple)) else bool(needed)


def _no_autocast(x: torch.Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
