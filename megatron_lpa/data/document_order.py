"""The order in which documents are read: theirs in the file, or a keyed shuffle.

The shuffle is a bijection of ``range(num_documents)`` that needs no stored table, like that of samples in
``permutation.py``, but made for whole datasets at a time: a Feistel network over the next power of two, whose
rounds are masks, shifts and 32-bit products instead of 64-bit remainders. Fifty million documents take a
second. What falls beyond the last document goes through it again ("cycle walking").

Which documents are held out rests on this file: changing any constant changes every split and every index in
a cache (tests hold golden values; ``index_cache.FORMAT`` has to change too).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_lpa.data.permutation import GAMMA, mix64

MAX_DOCUMENTS = 1 << 32
_ROUNDS = 6
_LEAST_BITS = 6  # halves of one or two bits would not mix in six rounds
_MULTIPLIER_1 = np.uint32(0x9E3779B1)
_MULTIPLIER_2 = np.uint32(0x85EBCA77)


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
        values = _rounds(values, bits, keys)
        if self.num_documents == 1 << bits:
            return values
        while True:
            outside = np.flatnonzero(values >= np.uint32(self.num_documents))
            if not outside.size:
                return values
            values[outside] = _rounds(values[outside], bits, keys)

    def _round_keys(self) -> np.ndarray:
        seed_hash = mix64(np.array([self.seed], dtype=np.uint64) + GAMMA)
        numbers = np.arange(1, _ROUNDS + 1, dtype=np.uint64)
        return (mix64(seed_hash + numbers * GAMMA) >> np.uint64(32)).astype(np.uint32)


def _rounds(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Feistel rounds over ``bits`` bits: uint32 ``(n,)``, overwritten, to uint32 ``(n,)``."""
    left_bits = bits // 2
    right_bits = bits - left_bits
    right = values & np.uint32((1 << right_bits) - 1)
    left = np.right_shift(values, np.uint32(right_bits), out=values)
    hashed = np.empty_like(left)
    for number, key in enumerate(keys):
        source, target, width = (right, left, left_bits) if number % 2 == 0 else (left, right, right_bits)
        np.multiply(source, _MULTIPLIER_1, out=hashed)
        hashed += key
        hashed ^= hashed >> np.uint32(15)
        hashed *= _MULTIPLIER_2
        hashed >>= np.uint32(32 - width)  # the high bits of a product depend on all of its factor
        target ^= hashed
    left <<= np.uint32(right_bits)
    left |= right
    return left
