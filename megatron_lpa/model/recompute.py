"""Activation checkpointing: what a layer keeps for its backward pass, and what it computes again.

* ``none``: autograd keeps what it wants.
* ``full``: a layer keeps its input and runs forward once more.
* ``selective``: a layer also keeps the results of its matrix products and of attention. The second run takes
  those from where they were kept and computes only what lies between: norms, activations, rotation, dropout,
  residual sums, and the collectives of tensor parallelism. Less memory than ``none`` for a few per cent of
  time.

Gradients are equal bit by bit in all three where repeated runs are, as on a CPU. Dropout draws the same
masks: the state of the generators is restored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Callable[..., torch.Tensor]

_PRODUCTS = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten.bmm.default",
    "aten.baddbmm.default",
    "megatron_lpa.lowdim.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_fused_attention_overrideable.default",
    "flash_attn._flash_attn_forward.default",
)
"""Names of operators whose results ``selective`` keeps. By name, because flash-attn may not be there."""


def recompute_for(mode: str) -> Recompute | None:
    """What ``train.activation_checkpointing`` asks for: calls ``function(x, rope)`` so that it runs again in
    backward."""
    assert mode in ("none", "selective", "full"), mode
    return {"none": None, "selective": _selective, "full": _full}[mode]


def keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """The policy of ``selective``; it is asked about every operator of a layer.

    A kept result must not be written to afterwards: PyTorch's check for that does not see what happens inside
    an autograd function.
    """
    return CheckpointPolicy.MUST_SAVE if _is_product(operator) else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_product(operator: Any) -> bool:
    return str(operator) in _PRODUCTS


def _full(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True)


def _selective(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, keep_products)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
