"""What each path of a low-dimensional product costs, by counting; the choice where nothing was measured.

Every operation that a path launches is counted: FLOPs, bytes of memory, bytes that the kernel's programs read
through the L2 cache, and launches. A test counts the same from what really runs. What a library's matrix
product reads through the L2 cache is inside the rate that it was measured at, so it counts none. A norm,
rotation and biases are not counted; they cost ``eager`` and ``joined`` the same or ``joined`` less. The
choice needs these two; the other paths are here for the figures that docs/kernels.md gives.

Letters: M tokens, d width of x, r rank and w output width of a pair, P pairs, e bytes per element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """One launch.

    Args:
        flops: two per multiply-add; zero for passes over memory.
        memory_bytes: every input read once, every output written once.
        l2_bytes: what all programs of the two-product kernel read and write together.
    """

    flops: int
    memory_bytes: int
    l2_bytes: int = 0


class Problem(NamedTuple):
    """Pairs that read one x.

    Args:
        tokens: M.
        d_in: d.
        ranks: r of each pair.
        widths: w of each pair.
        element_bytes: e.
        training: whether the backward pass is counted too, with all gradients.
    """

    tokens: int
    d_in: int
    ranks: tuple[int, ...]
    widths: tuple[int, ...]
    element_bytes: int = 2
    training: bool = True


class Rates(NamedTuple):
    """What a device reaches.

    Args:
        flops_per_second: of large matrix products.
        memory_bytes_per_second: of a large copy.
        l2_bytes_per_second: of reads that the L2 cache serves.
        launch_s: least time between two small kernels.
    """

    flops_per_second: float
    memory_bytes_per_second: float
    l2_bytes_per_second: float
    launch_s: float


H200 = Rates(790e12, 4.3e12, 5.5e12, 3e-6)
"""Products and copies as measured on such cards by others; the L2 cache and launches are assumed."""

A800 = Rates(271e12, 1.7e12, 4.0e12, 3e-6)
"""As ``H200``."""


def product(m: int, k: int, n: int, e: int) -> Work:
    """(m, k) times (k, n)."""
    return Work(2 * m * k * n, e * (m * k + k * n + m * n))


def _copy(elements: int, e: int) -> Work:
    return Work(0, 2 * e * elements)


def _addition(elements: int, e: int) -> Work:
    return Work(0, 3 * e * elements)


def _second_factors(p: Problem) -> list[Work]:
    """Gradients of the latents and of the second factors."""
    m, e = p.tokens, p.element_bytes
    pairs = list(zip(p.ranks, p.widths, strict=True))
    return [product(m, w, r, e) for r, w in pairs] + [product(w, m, r, e) for r, w in pairs]


def eager(p: Problem) -> list[Work]:
    """Two products per pair; backward four, and an addition of gradients of x for each pair but the first."""
    m, d, e = p.tokens, p.d_in, p.element_bytes
    sizes = zip(p.ranks, p.widths, strict=True)
    works = [w for r, width in sizes for w in (product(m, d, r, e), product(m, r, width, e))]
    if p.training:
        works += _second_factors(p)
        works += [w for r in p.ranks for w in (product(m, r, d, e), product(r, m, d, e))]
        works += [_addition(m * d, e)] * (len(p.ranks) - 1)
    return works


def joined(p: Problem) -> list[Work]:
    """First factors one below the other, put there by a copy in each direction: x is read once for all pairs,
    and one product writes the gradient of x."""
    m, d, e, total = p.tokens, p.d_in, p.element_bytes, sum(p.ranks)
    copy = [_copy(total * d, e)] if len(p.ranks) > 1 else []
    works = [*copy, product(m, d, total, e)]
    works += [product(m, r, width, e) for r, width in zip(p.ranks, p.widths, strict=True)]
    if p.training:
        works += [*_second_factors(p), *copy, product(m, total, d, e), product(total, m, d, e)]
    return works


def fused(p: Problem, forward_rows: int, backward_rows: int) -> list[Work]:
    """The two-product kernel in both directions; weights' gradients are plain products.

    Args:
        p: all ranks equal.
        forward_rows: tokens of a forward tile.
        backward_rows: tokens of a tile of the gradient of x.
    """
    m, d, e, total, outputs = p.tokens, p.d_in, p.element_bytes, sum(p.ranks), sum(p.widths)
    copy = [_copy(total * d, e)] if len(p.ranks) > 1 else []
    weights = total * d + sum(r * w for r, w in zip(p.ranks, p.widths, strict=True))
    kept = m * total if p.training else 0
    flops = 2 * m * weights

    def kernel(rows: int, read_per_token: int, memory: int, written: int) -> Work:
        tiles = -(-m // rows)
        # Rows past the end of x are read as well: they repeat the last one.
        return Work(
            flops, e * (memory + weights + written), e * (tiles * (rows * read_per_token + weights) + written)
        )

    works = [*copy, kernel(forward_rows, len(p.ranks) * d, m * d, m * outputs + kept)]
    if p.training:
        works += [*copy, kernel(backward_rows, outputs, m * outputs, m * (d + total))]
        works += [*_second_factors(p)[len(p.ranks) :], product(total, m, d, e)]
    return works


def dense_separate(p: Problem) -> list[Work]:
    """Dense projections of one x: a product each; backward two each, and additions of gradients of x. Ranks
    do not count."""
    m, d, e = p.tokens, p.d_in, p.element_bytes
    works = [product(m, d, w, e) for w in p.widths]
    if p.training:
        works += [one for w in p.widths for one in (product(m, w, d, e), product(w, m, d, e))]
        works += [_addition(m * d, e)] * (len(p.widths) - 1)
    return works


def dense_summed(p: Problem) -> list[Work]:
    """``dense_separate`` with the gradients of x summed inside the products, which read what is there
    already."""
    m, d, e = p.tokens, p.d_in, p.element_bytes
    works = [product(m, d, w, e) for w in p.widths]
    if p.training:
        for number, w in enumerate(p.widths):
            one = product(m, w, d, e)
            works.append(one if number == 0 else one._replace(memory_bytes=one.memory_bytes + e * m * d))
            works.append(product(w, m, d, e))
    return works


def dense_joined(p: Problem) -> list[Work]:
    """One product with the matrices one below the other. They and the outputs' gradients are copied
    together."""
    m, d, e, total = p.tokens, p.d_in, p.element_bytes, sum(p.widths)
    works = [_copy(total * d, e), product(m, d, total, e)]
    if p.training:
        works += [_copy(total * d, e), _copy(m * total, e), product(m, total, d, e), product(total, m, d, e)]
    return works


def seconds(works: Sequence[Work], rates: Rates) -> float:
    """Each launch takes the longest of its FLOPs, its memory, its L2 traffic and the least time of a
    launch."""
    return sum(
        max(
            work.flops / rates.flops_per_second,
            work.memory_bytes / rates.memory_bytes_per_second,
            work.l2_bytes / rates.l2_bytes_per_second,
            rates.launch_s,
        )
        for work in works
    )


LEAST_JOINED_TOKENS = 512
"""Below, a product may be bound by what it reads of the weights, and the copies of the factors would
count."""

JOINED_TOKENS_PER_RANK = 4
"""The copies break even with the additions of gradients alone at M = 4/3 of the sum of r for two pairs and
2/3 for three: three and six times that."""

NEVER = 2**31
"""More tokens than a product has."""

GRID_STEPS = 8
"""Numbers of tokens that are tried per doubling."""

GRID_END = 2**21
"""Where trying ends: by then nothing but bytes and FLOPs counts."""


@functools.cache
def least_joined_tokens(
    d_in: int, ranks: tuple[int, ...], widths: tuple[int, ...], element_bytes: int
) -> int:
    """The number of tokens from which ``joined`` is chosen over ``eager`` in training; ``NEVER`` for one
    pair.

    It takes as many FLOPs and fewer launches. From here on it also moves fewer bytes by a margin, so that it
    wins even where a product reads x for nothing; and at every number of tokens that is tried it takes less
    time by the rates of every device that is known here.
    """
    if len(ranks) < 2:
        return NEVER
    first = max(LEAST_JOINED_TOKENS, JOINED_TOKENS_PER_RANK * sum(ranks))
    doublings = max(1, (GRID_END // first).bit_length())
    least = NEVER
    for step in range(GRID_STEPS * doublings, -1, -1):
        tokens = math.ceil(first * 2 ** (step / GRID_STEPS))
        problem = Problem(tokens, d_in, ranks, widths, element_bytes)
        if any(seconds(joined(problem), rates) >= seconds(eager(problem), rates) for rates in (H200, A800)):
            break
        least = tokens
    return least
