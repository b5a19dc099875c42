"""Which implementation computes an operation. Results are equal up to rounding; only speed and memory differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class KernelConfig:
    """How operations are computed. ``auto`` takes what was measured to be fastest on the device.

    Args:
        lowdim: path of low-dimensional products (docs/kernels.md): ``eager`` is two matrix products per
            module, ``joined`` lets q, k and v share the first one, ``fused`` is the two-product kernel,
            ``merged`` multiplies the factors first. The environment variable ``MEGATRON_LPA_LOWDIM``
            goes before it.
    """

    lowdim: Literal["auto", "eager", "joined", "fused", "merged"] = "auto"
