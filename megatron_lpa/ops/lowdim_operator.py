"""The ``joined`` and ``fused`` paths of the low-dimensional product, and their gradients.

``megatron_lpa/ops/dispatch.py`` has chosen the path before. Lists have one entry per pair. All tensors have
one dtype, in which everything is computed: the caller (``ops/products.py``) has cast them as autocast asks.

``torch.compile`` and selective checkpointing look at operators, so both directions are registered ones, with
known shapes. Elsewhere an autograd function runs the same code without the operators' wrappers, which cost
the host as much time as the products of a small layer do.

Weights are saved as they were passed, not joined: under ZeRO-3 that is the parameter itself, whose storage
DeepSpeed empties after forward and fills again before backward.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_lpa.kernels.tiles import Tile
from megatron_lpa.ops import lowdim_math
from megatron_lpa.ops.elementwise import rotate_rows
from megatron_lpa.ops.lowdim_math import Needed, Saved


class Arguments(NamedTuple):
    """What the product is computed from.

    Args:
        x: (..., d_in).
        w_a: (r_p, d_in).
        w_b: (d_out_p, r_p).
        bias_a: (sum of r,) or None.
        bias_b: (d_out_p,) each, or none at all.
        norm_weight: (d_in,) of an RMSNorm applied to x before, or None.
        norm_eps: its epsilon.
        keep: whether a backward pass follows.
        forward_tile: ``str`` of a ``Tile`` for the fused kernel; empty for matrix products. (A string,
            because PyTorch takes an empty list of numbers for a list of tensors when it checks gradients.)
        backward_tile: the same for the gradient of x.
        cos: (S, E) fp32 with x of (..., S, d_in): rotary embedding of the first two outputs. Only with a
            ``forward_tile``: without the kernel it is a pass of its own in any case.
        sin: the same of sines.
        rotate_back_by: what turns the gradients of the first two outputs back; one of
            ``elementwise.BACKENDS``.
    """

    x: torch.Tensor
    w_a: Sequence[torch.Tensor]
    w_b: Sequence[torch.Tensor]
    bias_a: torch.Tensor | None = None
    bias_b: Sequence[torch.Tensor] = ()
    norm_weight: torch.Tensor | None = None
    norm_eps: float = 0.0
    keep: bool = True
    forward_tile: str = ""
    backward_tile: str = ""
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    rotate_back_by: str = "eager"


class GradientArguments(NamedTuple):
    """What the gradients are computed from: gradients of the outputs, what ``compute`` returned last, and of
    ``Arguments`` what has a part in them; ``need`` has the fields of ``Needed``."""

    dz: Sequence[torch.Tensor]
    x: torch.Tensor
    latent: torch.Tensor
    rstd: torch.Tensor
    w_a: Sequence[torch.Tensor]
    w_b: Sequence[torch.Tensor]
    bias_a: torch.Tensor | None
    norm_weight: torch.Tensor | None
    need: Sequence[bool]
    backward_tile: str


class Gradients(NamedTuple):
    """Of the tensors of ``Arguments``; None where none was asked for."""

    x: torch.Tensor | None
    w_a: list[torch.Tensor | None]
    w_b: list[torch.Tensor | None]
    bias_a: torch.Tensor | None
    bias_b: list[torch.Tensor | None]
    norm_weight: torch.Tensor | None


def lowdim(a: Arguments) -> tuple[torch.Tensor, ...]:
    """(..., d_out_p) of each pair, differentiable once."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return tuple(lowdim_operator(*a)[: len(a.w_a)])
    if a.keep:
        return _LowDim.apply(a, a.x, a.bias_a, a.norm_weight, *a.w_a, *a.w_b, *a.bias_b)
    with torch.no_grad():
        return tuple(compute(a)[: len(a.w_a)])


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., d) -> (M, d), a view wherever the strides allow one."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 would be ambiguous for zero tokens


def compute(a: Arguments) -> list[torch.Tensor]:
    """Outputs (..., d_out_p) of each pair, then the latents (M, sum of r) and 1/rms (M,), empty unless
    ``keep``."""
    assert a.cos is None or a.forward_tile
    rows = as_rows(a.x)
    biases: Sequence[torch.Tensor | None] = a.bias_b or [None] * len(a.w_b)
    with _no_autocast(a.x):
        if a.forward_tile:
            from megatron_lpa.kernels import launch  # Triton is optional

            first = lowdim_math.join_first(a.w_a, a.norm_weight)
            eps = None if a.norm_weight is None else a.norm_eps
            rotary = None if a.cos is None or a.sin is None else launch.Rotary(a.cos, a.sin)
            z, latent, rstd = launch.forward(
                rows, first, a.w_b, a.bias_a, biases, Tile.parse(a.forward_tile), a.keep, eps, rotary
            )
        else:
            z, (latent, rstd) = lowdim_math.forward(
                rows, a.w_a, a.w_b, a.bias_a, biases, a.norm_weight, a.norm_eps
            )
    if not a.keep:
        latent, rstd = latent.new_empty(0), rstd.new_empty(0)
    return [*(part.view(*a.x.shape[:-1], part.shape[-1]) for part in z), latent, rstd]


def _computed_shapes(a: Arguments) -> list[torch.Tensor]:
    tokens = a.x.shape[:-1].numel()
    z = [a.x.new_empty((*a.x.shape[:-1], w.shape[0])) for w in a.w_b]
    latent = a.x.new_empty((tokens, sum(w.shape[0] for w in a.w_a)) if a.keep else (0,))
    rstd_shape = (tokens,) if a.keep and a.norm_weight is not None else (0,)
    return [*z, latent, a.x.new_empty(rstd_shape, dtype=lowdim_math.wide(a.x.dtype))]


def compute_gradients(a: GradientArguments) -> list[torch.Tensor]:
    """Gradients of x, the joined first factors, joined first biases, the norm's weight, then of each pair's
    second factor, then of each pair's second bias (if any is needed); empty where not needed."""
    rows, grads = as_rows(a.x), [as_rows(g) for g in a.dz]
    need, saved, has_norm = Needed(*a.need), Saved(a.latent, a.rstd), a.norm_weight is not None
    dx = a.x.new_empty(0)
    with _no_autocast(a.x):
        if a.backward_tile and need.x:
            from megatron_lpa.kernels import launch  # Triton is optional

            norm = launch.NormInputs(rows, a.latent, a.bias_a, a.rstd) if has_norm else None
            first = lowdim_math.join_first(a.w_a, a.norm_weight)
            dx, scaled = launch.input_gradient(grads, first, a.w_b, Tile.parse(a.backward_tile), norm)
        else:
            scaled = lowdim_math.latent_gradient(grads, a.w_b, a.rstd if has_norm else None)
            if need.x:
                first = lowdim_math.join_first(a.w_a, a.norm_weight)
                dx = lowdim_math.input_gradient(scaled, first, rows, saved, a.bias_a, has_norm)
        weights = lowdim_math.weight_gradients(grads, scaled, rows, saved, a.w_a, a.w_b, a.norm_weight, need)
    dx = dx.view(a.x.shape) if need.x else dx
    return [dx, weights.w_a, weights.bias_a, weights.norm_weight, *weights.w_b, *weights.bias_b]


def _gradient_shapes(a: GradientArguments) -> list[torch.Tensor]:
    need, ranks, empty = Needed(*a.need), sum(w.shape[0] for w in a.w_a), a.x.new_empty
    normed = need.first and a.norm_weight is not None
    return [
        empty(a.x.shape if need.x else (0,)),
        empty((ranks, a.x.shape[-1]) if need.first else (0,)),
        empty((ranks,) if need.bias_a else (0,)),
        a.norm_weight.new_empty(a.norm_weight.shape) if normed and a.norm_weight is not None else empty(0),
        *(empty(w.shape if need.w_b else (0,)) for w in a.w_b),
        *(empty(w.shape[0]) for w in a.w_b if need.bias_b),
    ]


def _registered(name: str, kind: Any, function: Callable[[Any], Any], shapes: Callable[[Any], Any]) -> Any:
    """``megatron_lpa::name``, whose arguments are the fields of ``kind``: one schema, spelt there."""

    def run(*fields: Any) -> Any:
        return function(kind(*fields))

    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, by_position, annotation=t) for n, t in typing.get_type_hints(kind).items()],
        return_annotation=list[torch.Tensor],
    )
    operator = torch.library.custom_op(f"megatron_lpa::{name}", run, mutates_args=())
    operator.register_fake(lambda *fields: shapes(kind(*fields)))
    return operator


lowdim_operator = _registered("lowdim", Arguments, compute, _computed_shapes)
gradient_operator = _registered("lowdim_backward", GradientArguments, compute_gradients, _gradient_shapes)


def _save(ctx: Any, a: Arguments, output: Sequence[torch.Tensor]) -> None:
    assert a.keep, "the caller says keep=True wherever a gradient can be asked for"
    ctx.pairs, ctx.biases_b, ctx.backward_tile = len(a.w_a), len(a.bias_b), a.backward_tile
    ctx.rotate_back_by = a.rotate_back_by
    ctx.save_for_backward(a.x, *a.w_a, *a.w_b, a.bias_a, a.norm_weight, a.cos, a.sin, *output[-2:])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any,
    grads: Sequence[torch.Tensor | None],
    need: Needed,
    backward: Callable[[GradientArguments], list[torch.Tensor]],
) -> Gradients:
    """From what ``_save`` kept, by the operator or by the function inside it."""
    x, *factors, bias_a, norm_weight, cos, sin, latent, rstd = ctx.saved_tensors
    n = ctx.pairs
    w_a, w_b = factors[:n], factors[n:]
    dz = [
        x.new_zeros((*x.shape[:-1], w.shape[0])) if g is None else g
        for g, w in zip(grads[:n], w_b, strict=True)
    ]
    if cos is not None:
        dz[:2] = rotate_rows(dz[0], dz[1], cos, sin, ctx.rotate_back_by, back=True)
    dx, d_first, d_bias_a, d_norm, *seconds = backward(
        GradientArguments(dz, x, latent, rstd, w_a, w_b, bias_a, norm_weight, list(need), ctx.backward_tile)
    )
    nothing: list[torch.Tensor | None] = [None] * n
    return Gradients(
        dx if need.x else None,
        # Views of one product, made here because an operator's outputs may not share memory.
        list(d_first.split([w.shape[0] for w in w_a])) if need.w_a else nothing,
        [*seconds[:n]] if need.w_b else nothing,
        d_bias_a if need.bias_a else None,
        [*seconds[n:]] if need.bias_b else [None] * ctx.biases_b,
        d_norm if need.norm_weight else None,
    )


def _operator_backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    need = Needed(*(any(n) if isinstance(n, (list, tuple)) else n for n in ctx.needs_input_grad[:6]))
    found = _gradients(ctx, grads, need, lambda a: gradient_operator(*a))
    return (*found, *[None] * (len(Arguments._fields) - len(found)))


lowdim_operator.register_autograd(
    _operator_backward, setup_context=lambda ctx, inputs, output: _save(ctx, Arguments(*inputs), output)
)


class _LowDim(torch.autograd.Function):
    """``compute`` and ``compute_gradients``. Autograd sees tensors that are arguments themselves, and not
    inside one."""

    @staticmethod
    def forward(ctx: Any, a: Arguments, *_seen: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        output = compute(a)
        _save(ctx, a, output)
        return tuple(output[: len(a.w_a)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        _, x, bias_a, norm_weight, *factors = ctx.needs_input_grad
        n = ctx.pairs
        need = Needed(
            x, any(factors[:n]), any(factors[n : 2 * n]), bias_a, any(factors[2 * n :]), norm_weight
        )
        found = _gradients(ctx, grads, need, compute_gradients)
        return (None, found.x, found.bias_a, found.norm_weight, *found.w_a, *found.w_b, *found.bias_b)


def _no_autocast(x: torch.Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
