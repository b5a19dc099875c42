"""Matrix products as the layers need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


def keep_partial_sums_in_fp32() -> None:
    """For this process: products in half precision on a GPU add their partial sums in fp32.

    cuBLAS may split a long sum over several programs and, by PyTorch's default, add their parts in bf16. Gradients of
    thin factors, (r, d) over all tokens, are such sums.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


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


def as_product_input(x: torch.Tensor) -> torch.Tensor:
    """``x`` as autocast hands it to a matrix product: cast once where several products, or other ranks, read it."""
    return x.to(autocast_dtype(x))


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """``x weight_p^T + bias_p`` of several matrices, (..., d_in) -> (..., d_out_p) each.

    Separate products hand back one gradient of x each, and autograd adds them in passes over memory. Here each product
    but the first adds to what is there (``planning/product_time.py`` counts both): as many FLOPs, fewer bytes and launches at any size.
    One product with all matrices would need them copied together, and the outputs' gradients too.

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
        # Weights as they were passed: under ZeRO-3 the parameters, emptied after forward and filled before backward.
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
            with torch.autocast(
                dz.device.type, enabled=False
            ):  # backward may run inside it; all is cast already
                if weights:
                    dx = dz @ weights[number] if dx is None else dx.addmm_(dz, weights[number])
                if needed[number]:
                    found[number] = dz.T @ x
                if needed[ctx.count + number]:
                    found[ctx.count + number] = dz.sum(dim=0)
        return (dx, None, *found)
