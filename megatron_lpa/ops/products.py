"""Matrix products as the layers need them: dense ones, and low-dimensional ones
``z = (x W_A^T + b_A) W_B^T + b_B`` (paper, Section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_lpa.ops.dispatch import Case, Plan, choose, kept_choice
from megatron_lpa.ops.elementwise import rms_norm, rotate_rows
from megatron_lpa.ops.lowdim_operator import Arguments, lowdim


def keep_partial_sums_in_fp32() -> None:
    """For this process: products in half precision on a GPU add their partial sums in fp32.

    cuBLAS may split a long sum over several programs and, by PyTorch's default, add their parts in bf16.
    Gradients of thin factors, (r, d) over all tokens, are such sums.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x weight^T + bias``, (..., d_in) -> (..., d_out).

    A bias goes with rows of a matrix. DeepSpeed's ZeRO-3 puts its own function in place of
    ``functional.linear``, for the rest of the process; for more than two axes that one adds the bias in place
    to the product, and selective checkpointing, which keeps the product, would add it again without noticing.
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


def as_product_input(x: torch.Tensor) -> torch.Tensor:
    """``x`` as autocast hands it to a matrix product: cast once where several products, or other ranks, read
    it."""
    return x.to(autocast_dtype(x))


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """``x weight_p^T + bias_p`` of several matrices, (..., d_in) -> (..., d_out_p) each.

    Separate products hand back one gradient of x each, and autograd adds them in passes over memory. Here
    each product but the first adds to what is there (``planning/product_time.py`` counts both): as many
    FLOPs, fewer bytes and launches at any size. One product with all matrices would need them copied
    together, and the outputs' gradients too.

    Differentiable once.
    """
    inputs = [x, *weights, *(b for b in biases if b is not None)]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if len(weights) == 1 or not training:
        return tuple(linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    # An autograd function has to be given what autocast would make of its tensors.
    x, weights = as_product_input(x), [as_product_input(w) for w in weights]
    biases = [None if b is None else as_product_input(b) for b in biases]
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    products = _Linears.apply(rows, len(weights), *weights, *biases)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in products)


class _Linears(torch.autograd.Function):
    """``linears`` of rows (M, d_in), with the gradient of x summed inside the products."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, count: int, *parameters: torch.Tensor | None) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        need_x, _, *needed = ctx.needs_input_grad
        # Weights as they were passed: under ZeRO-3 the parameters, emptied after forward and filled before
        # backward.
        ctx.save_for_backward(x if any(needed[:count]) else None, *(weights if need_x else ()))
        ctx.count = count
        ctx.set_materialize_grads(False)
        return tuple(
            functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True) if w is not None
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        _, _, *needed = ctx.needs_input_grad
        found: list[torch.Tensor | None] = [None] * (2 * ctx.count)
        dx: torch.Tensor | None = None
        for number, dz in enumerate(grads):
            if dz is None:
                continue
            # Backward may run inside autocast; all is cast already.
            with torch.autocast(dz.device.type, enabled=False):
                if weights:
                    dx = dz @ weights[number] if dx is None else dx.addmm_(dz, weights[number])
                if needed[number]:
                    found[number] = dz.T @ x
                if needed[ctx.count + number]:
                    found[ctx.count + number] = dz.sum(dim=0)
        return (dx, None, *found)


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
        cos: (S, E) fp32 for x of (..., S, d_in), the second half of E repeating the first
            (``layers.sublayers.rope_tables``).
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
        norm: an RMSNorm before all of them. ``fused`` folds it into the kernel, except in fp16, whose range
            an x without its norm can leave. The other paths compute it before: without the kernel, scaling
            latents and gradients would be as many passes over memory as the norm is.
        path: as in ``lowdim_linear``.
        elementwise: what computes the norm and the rotation where they are not folded, and turns gradients
            back; one of ``elementwise.BACKENDS``.
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
    plan = plan_of(path, case, x.shape[:-1].numel(), x.device)
    return lowdim_by_plan(x, pairs, norm, plan, training, elementwise, rotary)


def plan_of(path: str, case: Case, tokens: int, device: torch.device) -> Plan:
    """What ``dispatch.choose`` says, asked once per case; torch.compile makes a guard of every comparison in
    it."""
    return (choose if torch.compiler.is_compiling() else kept_choice)(path, case, tokens, device)


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
        plan: a path and its tiles. A norm is folded into ``fused``, also where the plan has no tile for a
            direction; rotation only where the kernel computes the outputs.
        training: whether a backward pass follows.
    """
    assert rotary is None or rotary.cos.shape[0] == x.shape[-2], (rotary.cos.shape, x.shape)
    if rotary is not None and not plan.forward_tile:
        q, k, *others = lowdim_by_plan(x, pairs, norm, plan, training, elementwise)
        return (*rotate_rows(q, k, *rotary, elementwise), *others)
    dtype = autocast_dtype(x)
    # The kernel takes x and the norm in one precision; under autocast the residual stream has more than the
    # products.
    if norm is not None and (plan.path != "fused" or dtype == torch.float16 or x.dtype != dtype):
        x, norm = rms_norm(x, norm.weight, norm.eps, elementwise), None
    if norm is None:
        x = x.to(dtype)
    if plan.path == "eager":
        return tuple(linear(linear(x, pair.w_a, pair.bias_a), pair.w_b, pair.bias_b) for pair in pairs)
    x, pairs = x.to(dtype), [_cast(pair, dtype) for pair in pairs]
    weight, eps = (None, 0.0) if norm is None else (norm.weight.to(dtype), norm.eps)
    cos, sin = (None, None) if rotary is None else rotary
    return lowdim(
        Arguments(
            x, [pair.w_a for pair in pairs], [pair.w_b for pair in pairs], *_joined_biases(pairs), weight,
            eps, training, plan.forward_tile, plan.backward_tile, cos, sin, elementwise,
        )
    )  # fmt: skip


def _joined_biases(pairs: Sequence[Pair]) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """First biases one below the other, and second ones, with zeros for pairs that have none; or none at
    all."""
    bias_a: torch.Tensor | None = None
    if any(pair.bias_a is not None for pair in pairs):
        full = [p.w_a.new_zeros(p.w_a.shape[0]) if p.bias_a is None else p.bias_a for p in pairs]
        bias_a = full[0] if len(full) == 1 else torch.cat(full)
    if all(pair.bias_b is None for pair in pairs):
        return bias_a, []
    return bias_a, [p.w_b.new_zeros(p.w_b.shape[0]) if p.bias_b is None else p.bias_b for p in pairs]


def _cast(pair: Pair, dtype: torch.dtype) -> Pair:
    return Pair(*(None if t is None else t.to(dtype) for t in pair))  # type: ignore[arg-type]
