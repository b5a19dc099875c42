"""The orders of samples and of documents: keyed shuffles that need no stored table.

Each is a keyed bijection by a Feistel network: a value is written as a pair (left, right), and rounds add a
hash of one half to the other. Each round can be undone, so the whole is a bijection of all pairs; the few
values beyond the last sample or document are put through it again until they fall below it ("cycle walking"),
which keeps it a bijection.

Samples (``permuted``) have eight rounds modulo ``left < a`` and ``right < b``, with ``a * b`` just above
their number; the hash is SplitMix64's finaliser, keyed by seed, epoch and round. Documents
(``DocumentOrder``) are shuffled whole datasets at a time: over the next power of two, with masks, shifts and
32-bit products instead of 64-bit remainders. Fifty million documents take a second.

The order of a run's data, and which documents are held out, rest on this file: changing any constant changes
every run, every split and every index in a cache (tests hold golden values; ``index_cache.FORMAT`` has to
change too).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_SAMPLE_ROUNDS = 8
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROUND_OFFSETS = [np.uint64(int(_GAMMA) * (number + 1) % (1 << 64)) for number in range(_SAMPLE_ROUNDS)]
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

MAX_DOCUMENTS = 1 << 32
_DOCUMENT_ROUNDS = 6
_LEAST_BITS = 6  # halves of one or two bits would not mix in six rounds
_DOCUMENT_MIX_1 = np.uint32(0x9E3779B1)
_DOCUMENT_MIX_2 = np.uint32(0x85EBCA77)


def _mix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014), uint64 to uint64, element by element."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _sample_rounds(values: np.ndarray, keys: np.ndarray, left_size: int, right_size: int) -> np.ndarray:
    left, right = values // np.uint64(right_size), values % np.uint64(right_size)
    for number, offset in enumerate(_ROUND_OFFSETS):
        round_keys = _mix64(keys + offset)
        if number % 2 == 0:
            left = (left + _mix64(right + round_keys) % np.uint64(left_size)) % np.uint64(left_size)
        else:
            right = (right + _mix64(left + round_keys) % np.uint64(right_size)) % np.uint64(right_size)
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
    seed_hash = _mix64(np.array([seed], dtype=np.uint64) + _GAMMA)
    keys = _mix64(seed_hash + epochs.astype(np.uint64) * _GAMMA)
    values = _sample_rounds(positions.astype(np.uint64), keys, left_size, right_size)
    while True:
        outside = np.flatnonzero(values >= size)
        if not outside.size:
            return values.astype(np.int64)
        values[outside] = _sample_rounds(values[outside], keys[outside], left_size, right_size)


@dataclass(frozen=True)
class DocumentOrder:
    """Which document stands at each position.

    Args:
        num_documents: documents in all, 1 to ``MAX_DOCUMENTS``.
        seed: of the shuffle, a non-negative integer below 2**63.
    """

    num_documents: int
    seed: int

    def __post_init__(self) -> None:
        assert 1 <= self.num_documents <= MAX_DOCUMENTS and 0 <= self.seed < 1 << 63

    def range(self, start: int, stop: int) -> np.ndarray:
        """The documents at positions ``start`` to ``stop``: uint32 ``(stop - start,)``."""
        assert 0 <= start <= stop <= self.num_documents
        return self._permuted(np.arange(start, stop, dtype=np.uint32))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The documents at any positions: integers ``(n,)`` to uint32 ``(n,)``."""
        assert not positions.size or (positions.min() >= 0 and positions.max() < self.num_documents)
        return self._permuted(positions.astype(np.uint32))

    def _permuted(self, values: np.ndarray) -> np.ndarray:
        """Permutes ``values``, a uint32 array of our own, in place."""
        bits = max(_LEAST_BITS, (self.num_documents - 1).bit_length())
        keys = self._round_keys()
        values = _document_rounds(values, bits, keys)
        if self.num_documents == 1 << bits:
            return values
        while True:
            outside = np.flatnonzero(values >= np.uint32(self.num_documents))
            if not outside.size:
                return values
            values[outside] = _document_rounds(values[outside], bits, keys)

    def _round_keys(self) -> np.ndarray:
        seed_hash = _mix64(np.array([self.seed], dtype=np.uint64) + _GAMMA)
        numbers = np.arange(1, _DOCUMENT_ROUNDS + 1, dtype=np.uint64)
        return (_mix64(seed_hash + numbers * _GAMMA) >> np.uint64(32)).astype(np.uint32)


def _document_rounds(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Feistel rounds over ``bits`` bits: uint32 ``(n,)``, overwritten, to uint32 ``(n,)``."""
    left_bits = bits // 2
    right_bits = bits - left_bits
    right = values & np.uint32((1 << right_bits) - 1)
    left = np.right_shift(values, np.uint32(right_bits), out=values)
    hashed = np.empty_like(left)
    for number, key in enumerate(keys):
        source, target, width = (right, left, left_bits) if number % 2 == 0 else (left, right, right_bits)
        np.multiply(source, _DOCUMENT_MIX_1, out=hashed)
        hashed += key
        hashed ^= hashed >> np.uint32(15)
        hashed *= _DOCUMENT_MIX_2
        hashed >>= np.uint32(32 - width)  # the high bits of a product depend on all of its factor
        target ^= hashed
    left <<= np.uint32(right_bits)
    left |= right
    return left
