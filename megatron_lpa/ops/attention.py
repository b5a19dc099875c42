"""Causal attention by the implementation that is asked for.

On a GPU in half precision PyTorch is kept from its plain implementation, which would write an S x S matrix per
head and never says so. In fp32 and on a CPU it may choose as it likes.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lpa.errors import UserError

PATHS = ("auto", "sdpa", "flash_attn")
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
HALF = (torch.bfloat16, torch.float16)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, path: str) -> torch.Tensor:
    """``softmax(q k^T / sqrt(E)) v`` over the positions up to each query's own.

    Args:
        q: (B, S, H, E).
        k: (B, S, K, E); each of the K heads serves H / K neighbouring heads of q.
        v: (B, S, K, E).
        path: one of ``PATHS``; ``auto`` is ``sdpa``.

    Returns:
        (B, S, H, E). Heads lie next to each other, as the projections write and read them: no path copies.

    Raises:
        UserError: ``flash_attn`` where it cannot run, or no fused implementation for half precision on this GPU.
    """
    assert path in PATHS, path
    if path == "flash_attn":
        _check_flash_attn(q.device.type, q.dtype)
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=True)
    if q.is_cuda and q.dtype in HALF:
        try:
            with sdpa_kernel(FUSED):
                return _sdpa(q, k, v)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise UserError(
                f"no fused attention of PyTorch {torch.__version__} runs on this GPU for {q.dtype} with heads of "
                f"width {q.shape[-1]} ({q.shape[2]} query heads, {k.shape[2]} key heads); choose another "
                "model.head_dim (a multiple of 8, at most 256), or train.precision=fp32"
            ) from error
    return _sdpa(q, k, v)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(1, 2)


@functools.cache
def _check_flash_attn(device_type: str, dtype: torch.dtype) -> None:
    way_out = "set kernels.attention=auto"
    if device_type != "cuda":
        raise UserError(
            f"kernels.attention=flash_attn needs a GPU, but the model is on {device_type}; {way_out}"
        )
    if dtype not in HALF:
        raise UserError(f"kernels.attention=flash_attn needs half precision, not {dtype}; {way_out}")
    if importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            f"kernels.attention=flash_attn needs the package flash-attn; install it, or {way_out}"
        )
