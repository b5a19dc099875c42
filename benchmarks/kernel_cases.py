"""What the tuner measures, the most telling first: every case that a preset's training meets, and the paper's
shapes.

A measured case counts for up to ``dispatch.NEAR`` times fewer or more tokens. So a preset's micro-batch and
16 times as many (the paper's global batch) leave no gap between them. A test holds the list against the
presets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.kernel_layers import DECODE, DRY_DECODE, DRY_PAPER, LAYERNORM_WIDTHS, PAPER, Shape
from benchmarks.kernel_timing import Setting

MICRO_BATCHES = (
    (Shape(5120, 768, 128), True),  # s2_small
    (Shape(7680, 1024, 256), True),  # s2_medium
    (Shape(5120, 768, 256), False),  # s1_small
    (Shape(6144, 1024, 256), False),  # s1_medium
    (Shape(16384, 4096, 512), False),  # 3b
)
"""Of the presets ``*/lpa``; whether RMSNorm comes before q, k and v, and rotary embedding after (setting
2)."""

RANKS = tuple(Shape(6144, 1024, rank) for rank in (128, 64, 32))
"""Micro-batches of the paper's table 6: presets ``s1_medium/lpa_r*``."""


class Job(NamedTuple):
    """One line of the tuning table.

    Args:
        shape: tokens, width, rank.
        pairs: 3 for q, k, v; 1 for o.
        norm: whether RMSNorm comes before and rotary embedding after.
        training: whether a backward pass follows.
    """

    shape: Shape
    pairs: int
    norm: bool
    training: bool


def default_jobs(setting: Setting) -> list[Job]:
    """Training in the presets, then at the paper's batches, forward alone at both, and decoding; each
    once."""
    if setting.dry:
        return [
            *(job for shape in DRY_PAPER for training in (True, False) for job in jobs_of(shape, training)),
            *(job for shape in DRY_DECODE for job in jobs_of(shape, False)),
        ]
    return list(dict.fromkeys(_default_jobs()))


def jobs_of(shape: Shape, training: bool, norms: tuple[bool, ...] = (False, True)) -> Iterator[Job]:
    """q, k, v in each form, and o."""
    for norm in norms:
        yield Job(shape, 3, norm, training)
    yield Job(shape, 1, False, training)


def decode_norms(shape: Shape) -> tuple[bool, ...]:
    """The forms of a decoding size that its models have."""
    return (False,) if shape.width in LAYERNORM_WIDTHS else (False, True)


def _default_jobs() -> Iterator[Job]:
    for training in (True, False):
        for shape, norm in MICRO_BATCHES:
            yield from jobs_of(shape, training, (norm,))
        for shape in PAPER:
            yield from jobs_of(shape, training)
        for shape in RANKS:
            yield from jobs_of(shape, training, (False,))
    for shape in DECODE:
        # 16 tokens count for 4 to 64.
        if shape.tokens in (1, 16):
            yield from jobs_of(shape, False, decode_norms(shape))
