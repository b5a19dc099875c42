"""A shuffle that needs no stored index.

``permuted`` is a keyed bijection of ``range(size)``: position ``x`` is written as a pair (left, right) with
``left < a``, ``right < b`` and ``a * b`` just above ``size``, and eight Feistel rounds add a hash of one half
to the other, modulo its range. Each round can be undone, so the whole is a bijection of ``range(a * b)``;
the few values at or above ``size`` are put through it again until they fall below ("cycle walking"), which
keeps it a bijection of ``range(size)``. The hash is SplitMix64's finaliser, keyed by seed, epoch and round.

The order of a run's data rests on this file: changing any constant changes every run (tests hold golden
values).
"""

from __future__ import annotations

import math

import numpy as np

_ROUNDS = 8
GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROUND_OFFSETS = [np.uint64(int(GAMMA) * (number + 1) % (1 << 64)) for number in range(_ROUNDS)]
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def mix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014), uint64 to uint64, element by element."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIER_1
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIER_2
    return values ^ (values >> np.uint64(31))


def _rounds(values: np.ndarray, keys: np.ndarray, left_size: int, right_size: int) -> np.ndarray:
    left, right = values // np.uint64(right_size), values % np.uint64(right_size)
    for number, offset in enumerate(_ROUND_OFFSETS):
        round_keys = mix64(keys + offset)
        if number % 2 == 0:
            left = (left + mix64(right + round_keys) % np.uint64(left_size)) % np.uint64(left_size)
        else:
            right = (right + mix64(left + round_keys) % np.uint64(right_size)) % np.uint64(right_size)
    return left * np.uint64(right_size) + right


def permuted(positions: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Where each position of each epoch lands.

    Args:
        positions: integers ``(n,)`` in ``range(size)``.
        size: number of things shuffled, 1 or more.
        seed: any non-negative integer below 2**63.
        epochs: integers ``(n,)``, one per position; every epoch has its own order.

    Returns:
        int64 ``(n,)`` in ``range(size)``, a bijection of positions for each (seed, epoch).
    """
    assert size >= 1 and 0 <= seed < 1 << 63 and positions.shape == epochs.shape and positions.ndim == 1
    assert not positions.size or (positions.min() >= 0 and positions.max() < size)
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    seed_hash = mix64(np.array([seed], dtype=np.uint64) + GAMMA)
    keys = mix64(seed_hash + epochs.astype(np.uint64) * GAMMA)
    values = _rounds(positions.astype(np.uint64), keys, left_size, right_size)
    while True:
        outside = np.flatnonzero(values >= size)
        if not outside.size:
            return values.astype(np.int64)
        values[outside] = _rounds(values[outside], keys[outside], left_size, right_size)
