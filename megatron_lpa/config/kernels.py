"""Which implementation computes an operation. Results are equal up to rounding; only speed and memory
differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

EARLIER_LOWDIM_PATHS = {"merged": "eager"}
"""Values of ``kernels.lowdim`` in configurations of earlier versions. ``merged`` multiplied the two factors
first; no measurement asked for it, and results of all paths are equal up to rounding."""


@dataclass(frozen=True)
class KernelConfig:
    """How operations are computed (docs/kernels.md). What cannot run on the device is refused, never
    replaced.

    Args:
        lowdim: path of low-dimensional products: ``eager`` is two matrix products per
            module, ``joined`` lets q, k and v share the first one, ``fused`` is the two-product kernel,
            ``auto`` takes what was measured to be fastest on the device. With tensor parallelism it
            decides for q, k, v, up and gate in layout ``column_row``; o and down have a collective in
            between.
        elementwise: norms, rotary embedding, SwiGLU and the softmax of the loss: ``eager`` by PyTorch's
            operations, ``compiled`` by torch.compile, ``liger`` by the package liger-kernel; ``auto`` is
            ``compiled`` on a GPU and ``eager`` on a CPU.
        loss: ``whole`` keeps the logits of a micro-batch, ``chunked`` never holds them at once and computes
            them again in the backward pass; ``auto`` is ``chunked`` where the logits of a micro-batch would
            take more than 2 GiB.
        attention: ``sdpa`` is PyTorch's, ``flash_attn`` the package flash-attn; ``auto`` is ``sdpa``.
    """

    lowdim: Literal["auto", "eager", "joined", "fused"] = "auto"
    elementwise: Literal["auto", "eager", "compiled", "liger"] = "auto"
    loss: Literal["auto", "whole", "chunked"] = "auto"
    attention: Literal["auto", "sdpa", "flash_attn"] = "auto"


def anywhere(kernels: KernelConfig) -> KernelConfig:
    """The same, but ``auto`` for what needs a GPU or a package that need not be where a trained model is
    used."""
    return replace(
        kernels,
        lowdim="auto" if kernels.lowdim == "fused" else kernels.lowdim,
        elementwise="auto" if kernels.elementwise == "liger" else kernels.elementwise,
        attention="auto",
    )


LARGE_LOGITS_BYTES = 2 * 2**30
"""From here on ``loss=auto`` is ``chunked``. A choice by arithmetic, not by measurement."""

LOSS_CHUNK_BYTES = 512 * 2**20
"""fp32 logits of one chunk, of at least one token: about 4,000 tokens of 32,000 ids, enough rows for a
product at full speed."""


def most_whole_logits_bytes(loss: str) -> float:
    """Up to how many bytes a micro-batch's logits on one tensor-parallel rank are kept, by
    ``kernels.loss``."""
    return {"auto": LARGE_LOGITS_BYTES, "whole": math.inf, "chunked": -1}[loss]
