"""Triton kernels of the low-dimensional product: two matrix products, with the latent between them on chip.

``forward_kernel``: ``z_p = (x W_Ap^T + b_Ap) W_Bp^T + b_Bp`` for up to three pairs that read one x,
optionally with RMSNorm before and rotary embedding of the first two after. ``input_gradient_kernel``:
``dX = sum_p (dZ_p W_Bp) W_Ap``. ``inverse_rms_kernel``: 1/rms of x's rows, which large tiles of the forward
kernel are given. A program owns a tile of rows: it sums the latent (rows x r) in fp32, rounds it to the
inputs' dtype as two separate products would, and multiplies on from registers. Weights are addressed by
strides, so neither direction copies one. Every output element is written by one program in a fixed order of
sums: repeated runs give equal bits.

Pairs are the fastest index of the forward's grid: programs that read the same rows of x run side by side, so
x comes from device memory once and from the L2 cache for the other pairs.

This module needs Triton; ``megatron_lpa/kernels/launch.py`` calls it. Letters: M tokens, r rank, j an index
along r.
"""

# mypy: disable-error-code="import-untyped,import-not-found"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pick(pair: tl.tensor, of0: tl.tensor, of1: tl.tensor, of2: tl.tensor, PAIRS: tl.constexpr) -> tl.tensor:
    """The pointer or number of one pair. A select, unlike a branch, keeps what Triton knows of alignment."""
    chosen = of0
    if PAIRS > 1:
        chosen = tl.where(pair == 1, of1, chosen)
    if PAIRS > 2:
        chosen = tl.where(pair == 2, of2, chosen)
    return chosen


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, sums: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """``a @ b + sums`` in fp32. Triton's interpreter multiplies the bit patterns of bf16, hence
    ``widened``."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:  # noqa: RET505 (Triton compiles one branch)
        return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _sum_latent(
    x: tl.tensor, rows: tl.tensor, x_row: tl.tensor, x_column: tl.tensor,
    w: tl.tensor, w_depth: tl.tensor, w_rank: tl.tensor, depth: tl.tensor, rank: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr, PRECISION: tl.constexpr, SQUARES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """fp32 sums over the depth: (BLOCK_M, BLOCK_R) of ``x @ w``, and (BLOCK_M,) of x^2 if ``SQUARES``.

    ``SQUARES`` is for products that are not asynchronous: tiles below Hopper's 64 rows. An asynchronous one
    would take x from shared memory while the squares read it there, and Triton (3.6 and 3.7) gives x one slot
    too few for that: the next copy lands in what is still being multiplied. With x in registers instead,
    every product waits for the one before. ``tests/kernels/test_tiles.py`` looks for both in what is
    compiled.
    """
    k = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_R)
    x_at = x + rows[:, None] * x_row + k[None, :] * x_column
    w_at = w + k[:, None] * w_depth + j[None, :] * w_rank
    sums = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:  # noqa: SIM108 (Triton compiles one branch)
            a = tl.load(x_at)
        else:
            a = tl.load(x_at, mask=(start + k < depth)[None, :], other=0.0)
        if EVEN_K and EVEN_R:
            b = tl.load(w_at)
        else:
            b = tl.load(w_at, mask=(start + k < depth)[:, None] & (j < rank)[None, :], other=0.0)
        if SQUARES:
            wide = a.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        sums = _dot(a, b, sums, PRECISION)
        x_at += BLOCK_K * x_column
        w_at += BLOCK_K * w_depth
    return sums, squares


@triton.jit
def _second_factor(
    w: tl.tensor, w_rank: tl.tensor, w_width: tl.tensor, j: tl.tensor, n: tl.tensor,
    rank: tl.tensor, width: tl.tensor, EVEN_R: tl.constexpr, EVEN_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The tile (BLOCK_R, BLOCK_N) of a second factor, zero outside."""
    at = w + j[:, None] * w_rank + n[None, :] * w_width
    if EVEN_R and EVEN_N:
        return tl.load(at)
    else:  # noqa: RET505 (Triton compiles one branch)
        return tl.load(at, mask=(j < rank)[:, None] & (n < width)[None, :], other=0.0)


@triton.jit
def _rotated_columns(
    kept: tl.tensor, rows: tl.tensor, there: tl.tensor, split: tl.tensor, turns: tl.tensor, cos: tl.tensor,
    sin: tl.tensor, table_row: tl.tensor, positions: tl.tensor, w_b: tl.tensor, b_rank: tl.tensor,
    b_width: tl.tensor, bias_b: tl.tensor, z: tl.tensor, rank: tl.tensor, d_out: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_N: tl.constexpr,
    EVEN_R: tl.constexpr, EVEN_N: tl.constexpr, BIAS_B: tl.constexpr, HALF_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """The second product with rotary embedding: columns e and e + HALF_HEAD of each head at a time, half a
    block of each. Where ``turns`` is false they are stored as they are."""
    HALF_N: tl.constexpr = BLOCK_N // 2
    j = tl.arange(0, BLOCK_R)
    at_position = (rows % positions)[:, None] * table_row
    per_split = tl.cdiv(tl.cdiv(d_out // 2, HALF_N), SPLIT_N) * HALF_N
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, d_out // 2), HALF_N):
        couple = start + tl.arange(0, HALF_N)
        e = couple % HALF_HEAD
        n = couple // HALF_HEAD * (2 * HALF_HEAD) + e
        zeros = tl.zeros((BLOCK_M, HALF_N), dtype=tl.float32)
        first = _dot(
            kept, _second_factor(w_b, b_rank, b_width, j, n, rank, d_out, EVEN_R, EVEN_N), zeros, PRECISION
        )
        w = _second_factor(w_b, b_rank, b_width, j, n + HALF_HEAD, rank, d_out, EVEN_R, EVEN_N)
        second = _dot(kept, w, zeros, PRECISION)
        inside = n < d_out
        if BIAS_B:
            first += tl.load(bias_b + n, mask=inside, other=0.0).to(tl.float32)[None, :]
            second += tl.load(bias_b + n + HALF_HEAD, mask=inside, other=0.0).to(tl.float32)[None, :]
        c = tl.load(cos + at_position + e[None, :], mask=turns & inside[None, :], other=1.0)
        s = tl.load(sin + at_position + e[None, :], mask=turns & inside[None, :], other=0.0)
        # Selected, as an infinite neighbour times a sine of zero would not be zero.
        left = tl.where(turns, first * c - second * s, first)
        right = tl.where(turns, second * c + first * s, second)
        z_at = z + rows[:, None] * d_out + n[None, :]
        stored = there[:, None] & inside[None, :]
        tl.store(z_at, left.to(z.dtype.element_ty), mask=stored)
        tl.store(z_at + HALF_HEAD, right.to(z.dtype.element_ty), mask=stored)


@triton.jit
def inverse_rms_kernel(
    x: tl.tensor, rstd: tl.tensor, eps: tl.tensor, tokens: tl.tensor, d_in: tl.tensor, x_row: tl.tensor,
    x_column: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``1 / sqrt(mean(x^2) + eps)`` of each row, (M,) in fp32."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < tokens
    k = tl.arange(0, BLOCK_K)
    x_at = x + rows[:, None] * x_row + k[None, :] * x_column
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, d_in, BLOCK_K):
        inside = there[:, None] & (start + k < d_in)[None, :]
        wide = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        squares += wide * wide
        x_at += BLOCK_K * x_column
    tl.store(rstd + rows, tl.rsqrt(tl.sum(squares, axis=1) / d_in + eps), mask=there)


@triton.jit
def forward_kernel(
    x: tl.tensor, w_a: tl.tensor, bias_a: tl.tensor,
    w_b0: tl.tensor, w_b1: tl.tensor, w_b2: tl.tensor,
    bias_b0: tl.tensor, bias_b1: tl.tensor, bias_b2: tl.tensor,
    z0: tl.tensor, z1: tl.tensor, z2: tl.tensor, latent: tl.tensor, rstd: tl.tensor, eps: tl.tensor,
    tokens: tl.tensor, d_in: tl.tensor, rank: tl.tensor, d_out0: tl.tensor, d_out1: tl.tensor,
    d_out2: tl.tensor, x_row: tl.tensor, x_column: tl.tensor, a_rank: tl.tensor, a_depth: tl.tensor,
    b_width: tl.tensor, b_rank: tl.tensor, cos: tl.tensor, sin: tl.tensor, table_row: tl.tensor,
    positions: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, SPLIT_N: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_R: tl.constexpr, EVEN_N: tl.constexpr, BIAS_A: tl.constexpr, BIAS_B: tl.constexpr,
    KEEP: tl.constexpr, NORM: tl.constexpr, SQUARES: tl.constexpr, HALF_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``z_p`` (M, d_out_p), and where asked the latents (M, PAIRS * r).

    With ``NORM`` the rows' 1/rms (M,) is read from ``rstd``; with ``SQUARES`` it is computed here, and
    written there.
    ``HALF_HEAD``: half the width of a head, by which the first two pairs' outputs are rotated; 0 for no
    rotation. Row m is position m % positions.
    """
    program = tl.program_id(0)
    split = program % SPLIT_N
    pair = (program // SPLIT_N) % PAIRS
    # 64 bits: rows times a stride pass 2^31 at a million tokens.
    rows = (program // (SPLIT_N * PAIRS)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < tokens
    w_b = _pick(pair, w_b0, w_b1, w_b2, PAIRS)
    bias_b = _pick(pair, bias_b0, bias_b1, bias_b2, PAIRS)
    z = _pick(pair, z0, z1, z2, PAIRS)
    d_out = _pick(pair, d_out0, d_out1, d_out2, PAIRS)

    # Rows past the end repeat the last one: no mask in the loop, and what they give is not stored.
    read_rows = tl.minimum(rows, tokens - 1)
    sums, squares = _sum_latent(
        x, read_rows, x_row, x_column, w_a + pair * rank * a_rank, a_depth, a_rank, d_in, rank,
        BLOCK_M, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, PRECISION, SQUARES,
    )  # fmt: skip
    j = tl.arange(0, BLOCK_R)
    if SQUARES:
        scale = tl.rsqrt(squares / d_in + eps)
        sums *= scale[:, None]
        if KEEP:
            tl.store(rstd + rows, scale, mask=there & (pair == 0) & (split == 0))
    elif NORM:
        sums *= tl.load(rstd + read_rows)[:, None]
    if BIAS_A:
        sums += tl.load(bias_a + pair * rank + j, mask=j < rank, other=0.0).to(tl.float32)[None, :]
    kept = sums.to(x.dtype.element_ty)
    if KEEP:
        latent_at = latent + rows[:, None] * (PAIRS * rank) + (pair * rank + j)[None, :]
        tl.store(latent_at, kept, mask=(there & (split == 0))[:, None] & (j < rank)[None, :])

    if HALF_HEAD > 0:
        _rotated_columns(
            kept, rows, there, split, pair < 2, cos, sin, table_row, positions, w_b, b_rank, b_width, bias_b,
            z, rank, d_out, BLOCK_M, BLOCK_R, BLOCK_N, SPLIT_N, EVEN_R, EVEN_N, BIAS_B, HALF_HEAD, PRECISION,
        )  # fmt: skip
    else:
        per_split = tl.cdiv(tl.cdiv(d_out, BLOCK_N), SPLIT_N) * BLOCK_N
        for start in range(split * per_split, tl.minimum((split + 1) * per_split, d_out), BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            w = _second_factor(w_b, b_rank, b_width, j, n, rank, d_out, EVEN_R, EVEN_N)
            product = _dot(kept, w, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), PRECISION)
            if BIAS_B:
                product += tl.load(bias_b + n, mask=n < d_out, other=0.0).to(tl.float32)[None, :]
            z_at = z + rows[:, None] * d_out + n[None, :]
            tl.store(z_at, product.to(z.dtype.element_ty), mask=there[:, None] & (n < d_out)[None, :])


@triton.jit
def _pair_gradient(
    dz: tl.tensor, rows: tl.tensor, there: tl.tensor, split: tl.tensor, dz_row: tl.tensor,
    dz_column: tl.tensor, w_b: tl.tensor, b_width: tl.tensor, b_rank: tl.tensor, d_out: tl.tensor,
    rank: tl.tensor, latent: tl.tensor, latent_grad: tl.tensor, bias_a: tl.tensor, scale: tl.tensor,
    read_rows: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr, BIAS_A: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr, PAIR: tl.constexpr, PAIRS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One pair's latent gradient, rounded (times 1/rms with ``NORM``), and its part of the norm's row
    sums."""
    sums, _ = _sum_latent(
        dz, read_rows, dz_row, dz_column, w_b, b_width, b_rank, d_out, rank,
        BLOCK_M, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, PRECISION, False,
    )  # fmt: skip
    j = tl.arange(0, BLOCK_R)
    at = rows[:, None] * (PAIRS * rank) + (PAIR * rank + j)[None, :]
    stored = there[:, None] & (j < rank)[None, :]
    row_sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if NORM:
        normed = tl.load(latent + at, mask=stored, other=0.0).to(tl.float32)
        if BIAS_A:
            normed -= tl.load(bias_a + PAIR * rank + j, mask=j < rank, other=0.0).to(tl.float32)[None, :]
        row_sums = tl.sum(sums * normed, axis=1)
        sums *= scale[:, None]
    kept = sums.to(dz.dtype.element_ty)
    tl.store(latent_grad + at, kept, mask=stored & (split == 0))
    return kept, row_sums


@triton.jit
def input_gradient_kernel(
    dz0: tl.tensor, dz1: tl.tensor, dz2: tl.tensor, w_b0: tl.tensor, w_b1: tl.tensor, w_b2: tl.tensor,
    w_a: tl.tensor, dx: tl.tensor, latent_grad: tl.tensor, x: tl.tensor, latent: tl.tensor,
    bias_a: tl.tensor, rstd: tl.tensor, tokens: tl.tensor, d_in: tl.tensor, rank: tl.tensor,
    d_out0: tl.tensor, d_out1: tl.tensor, d_out2: tl.tensor, row0: tl.tensor, row1: tl.tensor,
    row2: tl.tensor, column0: tl.tensor, column1: tl.tensor, column2: tl.tensor, x_row: tl.tensor,
    x_column: tl.tensor, a_rank: tl.tensor, a_depth: tl.tensor, b_width: tl.tensor, b_rank: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PAIRS: tl.constexpr, SPLIT_N: tl.constexpr, EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
    EVEN_N: tl.constexpr, BIAS_A: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``dX`` (M, d_in) and the latents' gradients (M, PAIRS * r), which the weights' gradients
    need."""
    program = tl.program_id(0)
    split = program % SPLIT_N
    rows = (program // SPLIT_N).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < tokens
    read_rows = tl.minimum(rows, tokens - 1)
    scale = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if NORM:
        scale = tl.load(rstd + read_rows)

    g0, row_sums = _pair_gradient(
        dz0, rows, there, split, row0, column0, w_b0, b_width, b_rank, d_out0, rank, latent, latent_grad,
        bias_a, scale, read_rows, BLOCK_M, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, BIAS_A, NORM, PRECISION, 0,
        PAIRS,
    )  # fmt: skip
    if PAIRS > 1:
        g1, more = _pair_gradient(
            dz1, rows, there, split, row1, column1, w_b1, b_width, b_rank, d_out1, rank, latent, latent_grad,
            bias_a, scale, read_rows, BLOCK_M, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, BIAS_A, NORM, PRECISION, 1,
            PAIRS,
        )  # fmt: skip
        row_sums += more
    if PAIRS > 2:
        g2, more = _pair_gradient(
            dz2, rows, there, split, row2, column2, w_b2, b_width, b_rank, d_out2, rank, latent, latent_grad,
            bias_a, scale, read_rows, BLOCK_M, BLOCK_K, BLOCK_R, EVEN_K, EVEN_R, BIAS_A, NORM, PRECISION, 2,
            PAIRS,
        )  # fmt: skip
        row_sums += more
    # d(1/rms): see megatron_lpa/ops/lowdim_math.py, which has the derivation.
    pull = row_sums * scale * scale / d_in

    j = tl.arange(0, BLOCK_R)
    per_split = tl.cdiv(tl.cdiv(d_in, BLOCK_N), SPLIT_N) * BLOCK_N
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, d_in), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        w = _second_factor(w_a, a_rank, a_depth, j, n, rank, d_in, EVEN_R, EVEN_N)
        product = _dot(g0, w, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), PRECISION)
        if PAIRS > 1:
            w = _second_factor(w_a + rank * a_rank, a_rank, a_depth, j, n, rank, d_in, EVEN_R, EVEN_N)
            product = _dot(g1, w, product, PRECISION)
        if PAIRS > 2:
            w = _second_factor(w_a + 2 * rank * a_rank, a_rank, a_depth, j, n, rank, d_in, EVEN_R, EVEN_N)
            product = _dot(g2, w, product, PRECISION)
        inside = there[:, None] & (n < d_in)[None, :]
        if NORM:
            x_at = x + read_rows[:, None] * x_row + n.to(tl.int64)[None, :] * x_column
            product -= pull[:, None] * tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + rows[:, None] * d_in + n[None, :], product.to(dx.dtype.element_ty), mask=inside)
