"""Launches of the two-product kernels: what they read, allocate and return. Needs Triton."""

# mypy: disable-error-code="import-untyped,import-not-found"
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from megatron_lpa.kernels.lowdim_kernels import forward_kernel, input_gradient_kernel, inverse_rms_kernel
from megatron_lpa.kernels.tiles import ASYNCHRONOUS_ROWS, MAX_PAIRS, Tile, padded_rank


class Rotary(NamedTuple):
    """Tables of a rotary embedding, (S, E) each in fp32, the second half of E repeating the first. Row m of x
    is at position m % S."""

    cos: torch.Tensor
    sin: torch.Tensor


class NormInputs(NamedTuple):
    """What the gradient through an RMSNorm needs: ``x`` (M, d_in), ``latent`` (M, P * r), ``bias_a`` (P * r,)
    or None, and ``rstd`` (M,), which is 1/rms in fp32."""

    x: torch.Tensor
    latent: torch.Tensor
    bias_a: torch.Tensor | None
    rstd: torch.Tensor


def forward(
    x: torch.Tensor,
    w_a: torch.Tensor,
    w_b: Sequence[torch.Tensor],
    bias_a: torch.Tensor | None,
    bias_b: Sequence[torch.Tensor | None],
    tile: Tile,
    keep: bool,
    norm_eps: float | None = None,
    rotary: Rotary | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """``z_p`` of P pairs that read one x.

    Args:
        x: (M, d_in), any strides; fp32, bf16 or fp16.
        w_a: (P * r, d_in), the first factors one below the other; any strides.
        w_b: P matrices (d_out_p, r).
        bias_a: (P * r,) or None.
        bias_b: P biases (d_out_p,), or None each.
        tile: how to cut.
        keep: return the latents, for the weights' gradients.
        norm_eps: with a value, x is divided by ``sqrt(mean(x^2) + norm_eps)`` row by row; the norm's weight
            is expected in ``w_a``'s columns.
        rotary: turns the heads of the first two outputs (half rotation), whose widths are multiples of E.

    Returns:
        P outputs (M, d_out_p); latents (M, P * r) in x's dtype, empty without ``keep``; 1/rms (M,) in fp32,
        empty without ``norm_eps``, and without ``keep`` for small tiles.
    """
    (tokens, d_in), pairs, rank = x.shape, len(w_b), w_b[0].shape[1]
    widths = [w.shape[0] for w in w_b]
    w_b = _same_strides(w_b)
    bias_b = _all_or_none(bias_b, widths, x)
    norm = norm_eps is not None
    cos, sin = (x, x) if rotary is None else (rotary.cos.contiguous(), rotary.sin.contiguous())
    assert rotary is None or (pairs > 1 and all(width % cos.shape[1] == 0 for width in widths)), widths
    z = [x.new_empty((tokens, width)) for width in widths]
    latent = x.new_empty((tokens, pairs * rank) if keep else (0,))
    squares = norm and tile.block_m < ASYNCHRONOUS_ROWS
    written = tokens if norm and (keep or not squares) else 0
    rstd = torch.empty((written,), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return z, latent, rstd
    if norm_eps is not None and not squares:
        inverse_rms(x, norm_eps, rstd)
    grid = (triton.cdiv(tokens, tile.block_m) * pairs * tile.split_n,)
    with _device_of(x):
        forward_kernel[grid](
            x, w_a, x if bias_a is None else bias_a.contiguous(),
            *_three(w_b), *_three([x if b is None else b for b in bias_b]), *_three(z), latent, rstd,
            0.0 if norm_eps is None else norm_eps, tokens, d_in, rank, *_three(widths),
            *x.stride(), *w_a.stride(), *w_b[0].stride(), cos, sin, cos.stride(0), cos.shape[0],
            **_cut(tile.for_rotary() if rotary else tile, rank, d_in, widths, x), PAIRS=pairs,
            BIAS_A=bias_a is not None, BIAS_B=bias_b[0] is not None, KEEP=keep, NORM=norm, SQUARES=squares,
            HALF_HEAD=0 if rotary is None else cos.shape[1] // 2,
        )  # fmt: skip
    return z, latent, rstd


def inverse_rms(x: torch.Tensor, eps: float, rstd: torch.Tensor) -> None:
    """Writes 1/rms of the rows of x (M, d) into ``rstd`` (M,) fp32, M at least 1: one read of x."""
    tokens, width = x.shape
    block = min(1024, triton.next_power_of_2(width))
    rows = 4096 // block
    with _device_of(x):
        inverse_rms_kernel[(triton.cdiv(tokens, rows),)](
            x, rstd, eps, tokens, width, *x.stride(), BLOCK_M=rows, BLOCK_K=block
        )


def input_gradient(
    dz: Sequence[torch.Tensor],
    w_a: torch.Tensor,
    w_b: Sequence[torch.Tensor],
    tile: Tile,
    norm: NormInputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dX = sum_p (dZ_p W_Bp) W_Ap`` and the latents' gradients.

    Args:
        dz: P gradients (M, d_out_p), any strides.
        w_a: (P * r, d_in), any strides.
        w_b: P matrices (d_out_p, r).
        tile: how to cut; ``block_k`` walks along d_out, ``block_n`` along d_in.
        norm: what the gradient through the norm needs, or None without one.

    Returns:
        (M, d_in), and (M, P * r): the latents' gradients, times 1/rms with a norm.
    """
    tokens, pairs, rank, d_in = dz[0].shape[0], len(w_b), w_b[0].shape[1], w_a.shape[1]
    widths = [w.shape[0] for w in w_b]
    w_b = _same_strides(w_b)
    dx = dz[0].new_empty((tokens, d_in))
    latent_grad = dz[0].new_empty((tokens, pairs * rank))
    if tokens == 0:
        return dx, latent_grad
    x, latent, bias_a, rstd = (dx, dx, None, dx) if norm is None else norm
    with _device_of(dx):
        input_gradient_kernel[(triton.cdiv(tokens, tile.block_m) * tile.split_n,)](
            *_three(dz), *_three(w_b), w_a, dx, latent_grad, x, latent,
            dx if bias_a is None else bias_a.contiguous(), rstd, tokens, d_in, rank, *_three(widths),
            *_three([g.stride(0) for g in dz]), *_three([g.stride(1) for g in dz]), *x.stride(),
            *w_a.stride(), *w_b[0].stride(),
            **_cut(tile, rank, d_in, widths, dx, backward=True), PAIRS=pairs,
            BIAS_A=bias_a is not None, NORM=norm is not None,
        )  # fmt: skip
    return dx, latent_grad


def runs_under_interpreter() -> bool:
    """Whether these kernels were loaded with ``TRITON_INTERPRET=1``: then they run on the CPU, slowly."""
    return not isinstance(forward_kernel, triton.JITFunction)


def asks_for_tf32() -> bool:
    """Whether fp32 products may use tf32, by PyTorch's own setting for matrix products on a GPU."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _precision(dtype: torch.dtype) -> str:
    if runs_under_interpreter() and dtype == torch.bfloat16:
        return "widened"
    # Triton's default for fp32 would be tf32, whatever PyTorch is set to.
    return "tf32" if dtype == torch.float32 and asks_for_tf32() else "ieee"


def _cut(
    tile: Tile, rank: int, d_in: int, widths: Sequence[int], x: torch.Tensor, backward: bool = False
) -> dict[str, Any]:
    depths, outputs = (widths, [d_in]) if backward else ([d_in], widths)
    block_r = padded_rank(rank)
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "BLOCK_R": block_r,
        "BLOCK_N": tile.block_n,
        "SPLIT_N": tile.split_n,
        "EVEN_K": all(depth % tile.block_k == 0 for depth in depths),
        "EVEN_R": rank == block_r,
        "EVEN_N": all(width % tile.block_n == 0 for width in outputs),
        "PRECISION": _precision(x.dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _same_strides(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The kernels take one pair of strides for all second factors; parameters have it, others are copied."""
    if len({matrix.stride() for matrix in matrices}) == 1:
        return list(matrices)
    return [matrix.contiguous() for matrix in matrices]


def _all_or_none(
    biases: Sequence[torch.Tensor | None], widths: Sequence[int], like: torch.Tensor
) -> list[Any]:
    """Biases of all pairs, zeros for those that have none; or none at all."""
    if all(bias is None for bias in biases):
        return list(biases)
    full = [like.new_zeros(width) if b is None else b for b, width in zip(biases, widths, strict=True)]
    return [bias.contiguous() for bias in full]


def _three(values: Sequence[Any]) -> list[Any]:
    """The kernels have three of each argument; those that are not read repeat the last."""
    return [*values, *[values[-1]] * (MAX_PAIRS - len(values))]


def _device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
