"""What the device can do, and how much of it a run uses."""

from __future__ import annotations

import resource
import sys

import torch

PEAK_TFLOPS = {"A100": 312.0, "A800": 312.0, "H100": 989.0, "H200": 989.0, "H800": 989.0}
"""Dense bf16 tensor-core peak, TFLOP/s, without sparsity (NVIDIA data sheets, SXM)."""


def peak_flops_per_second(configured_tflops: float | None) -> float | None:
    """Peak of one device in FLOP/s: the configured one, or the known one of the GPU, or None."""
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops * 1e12
    return None


def peak_memory_bytes() -> int:
    """Largest memory use so far: allocated on the GPU, or resident of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
