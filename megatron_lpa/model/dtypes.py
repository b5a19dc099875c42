"""PyTorch's dtypes of a run's precision."""

from __future__ import annotations

import torch

from megatron_lpa.config.precision import PRECISIONS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def weights_dtype(precision: str) -> torch.dtype:
    """Of the model's parameters, by ``train.precision``."""
    return DTYPES[PRECISIONS[precision].weights]


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What autocast makes of the products' inputs; None where parameters and products are of one
    precision."""
    wanted = PRECISIONS[precision]
    return DTYPES[wanted.products] if wanted.mixed else None
