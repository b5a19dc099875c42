"""The low-dimensional product for autograd, past the registered operator wherever nobody looks at operators.

The operator's wrappers cost the host time at every call, forward and backward. Under torch.compile and selective
checkpointing the operator is what has to be seen; elsewhere an autograd function runs the same code without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_lpa.ops.lowdim_op import (
    Arguments,
    Needed,
    compute,
    compute_gradients,
    gradients_of,
    lowdim_op,
    save_for_backward,
)


class _LowDim(torch.autograd.Function):
    """``compute`` and ``compute_gradients``. Autograd sees tensors that are arguments themselves, and not inside one."""

    @staticmethod
    def forward(ctx: Any, arguments: Arguments, *_seen: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        output = compute(*arguments)
        save_for_backward(ctx, arguments, output)
        return tuple(output[: len(arguments.w_a)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        _, x, bias_a, norm, *factors = ctx.needs_input_grad
        n = ctx.pairs
        need = Needed(x, any(factors[:n]), any(factors[n : 2 * n]), bias_a, any(factors[2 * n :]), norm)
        found = gradients_of(ctx, grads, need, compute_gradients)
        return (None, found.x, found.bias_a, found.norm, *found.w_a, *found.w_b, *found.bias_b)


def lowdim(arguments: Arguments) -> Sequence[torch.Tensor]:
    """``lowdim_op`` where something looks at operators (torch.compile, selective checkpointing), else what is inside it.

    Returns:
        (..., d_out_p) of each pair.
    """
    a = arguments
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return lowdim_op(*a)[: len(a.w_a)]
    if a.keep:
        return _LowDim.apply(a, a.x, a.bias_a, a.norm_weight, *a.w_a, *a.w_b, *a.bias_b)
    with torch.no_grad():
        return compute(*a)[: len(a.w_a)]
