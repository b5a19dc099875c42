"""The low-dimensional product for autograd, past the registered operator wherever nobody looks at operators.

The operator's wrappers take the host longer than a small product takes a GPU. With tiny matrices
on one CPU core, the forward pass of three pairs took twice as long through them as through an autograd function
around the same code. Under torch.compile and selective checkpointing the operator is what has to be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_lpa.ops.lowdim_op import (
    Needed,
    Tensors,
    compute,
    compute_gradients,
    gradients_of,
    lowdim_op,
    save_for_backward,
)


class _LowDim(torch.autograd.Function):
    """The same without the registered operator, whose wrappers take the host longer than a small product takes a GPU."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[float, str, str, str],
        counts: tuple[int, int],
        x: torch.Tensor,
        bias_a: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        (eps, forward_tile, backward_tile, rotate_back_by), (pairs, biases_b) = settings, counts
        w_a, w_b, bias_b = factors[:pairs], factors[pairs : 2 * pairs], factors[2 * pairs :]
        *z, latent, rstd = compute(
            x, w_a, w_b, bias_a, bias_b, norm_weight, eps, True, forward_tile, backward_tile, cos, sin, rotate_back_by
        )  # fmt: skip
        save_for_backward(ctx, x, w_a, w_b, bias_a, biases_b, norm_weight, backward_tile, cos, sin, rotate_back_by, (latent, rstd))  # fmt: skip
        return tuple(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        _, _, x, bias_a, norm, _, _, *factors = ctx.needs_input_grad
        n = ctx.pairs
        need = Needed(x, any(factors[:n]), any(factors[n : 2 * n]), bias_a, any(factors[2 * n :]), norm)
        found = gradients_of(ctx, grads, need, compute_gradients)
        return (None, None, found.x, found.bias_a, found.norm, None, None, *found.w_a, *found.w_b, *found.bias_b)  # fmt: skip


def lowdim(
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
) -> Sequence[torch.Tensor]:
    """``lowdim_op`` where something looks at operators (torch.compile, selective checkpointing), else what is inside it.

    Returns:
        (..., d_out_p) of each pair.
    """
    n = len(w_a)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return lowdim_op(
            x, w_a, w_b, bias_a, bias_b, norm_weight, norm_eps, keep, forward_tile, backward_tile, cos, sin, rotate_back_by
        )[:n]  # fmt: skip
    if keep:
        settings = (norm_eps, forward_tile, backward_tile, rotate_back_by)
        return _LowDim.apply(settings, (n, len(bias_b)), x, bias_a, norm_weight, cos, sin, *w_a, *w_b, *bias_b)  # fmt: skip
    with torch.no_grad():
        return compute(
            x, w_a, w_b, bias_a, bias_b, norm_weight, norm_eps, False, forward_tile, backward_tile, cos, sin, rotate_back_by
        )[:n]  # fmt: skip
