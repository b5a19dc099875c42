"""Which of several datasets each sample of a blend comes from.

After any ``n`` draws dataset ``i`` of weight ``w`` has been drawn within one sample of ``n w``. That is the
chairman assignment problem (Tijdeman, 1980). It is solved as periodic tasks are scheduled fairly (Baruah and
others, 1996): draw ``k`` of the dataset may come at position ``floor(k / w)`` at the earliest, has to come before
``ceil((k + 1) / w)``, and of the draws allowed at a position the one with the earliest end is taken. Always
drawing the dataset furthest behind is simpler and misses the bound with many datasets.

Arithmetic is in whole numbers, so the result is exact for any weights. The order repeats after as many draws
as the weights' common denominator; nothing beyond a chunk of it is stored.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_CHUNK = 1 << 16
_KEPT_CHUNKS = 8


class Interleave:
    """Positions of a blend to draws of its datasets.

    Args:
        weights: above 0, their sum 1.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        assert weights and sum(weights) == 1 and min(weights) > 0
        self.weights = tuple(weights)
        self._period = math.lcm(*(weight.denominator for weight in weights))
        self._shares = [int(weight * self._period) for weight in weights]
        self._starts = [[0] * len(weights)]  # draws before each chunk
        self._chunks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which dataset is drawn at each position, and for which time, from 0.

        Going to position ``n`` for the first time takes about a microsecond times ``n``, or times the
        weights' common denominator if that is smaller.

        Args:
            positions: int64 ``(n,)``, 0 or more.

        Returns:
            datasets int64 ``(n,)`` and draws int64 ``(n,)``.
        """
        assert not positions.size or positions.min() >= 0
        if self._period <= np.iinfo(np.int64).max:
            cycles, inside = np.divmod(positions, self._period)
            drawn_per_cycle = np.array(self._shares, dtype=np.int64)
        else:
            cycles, inside = np.zeros_like(positions), positions
            drawn_per_cycle = np.zeros(len(self._shares), dtype=np.int64)
        datasets, draws = np.empty_like(positions), np.empty_like(positions)
        numbers = inside // _CHUNK
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            chunk_datasets, chunk_draws = self._chunk(number)
            offsets = inside[here] - number * _CHUNK
            datasets[here] = chunk_datasets[offsets]
            draws[here] = chunk_draws[offsets]
        return datasets, draws + cycles * drawn_per_cycle[datasets]

    def _chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._chunks:
            for earlier in range(len(self._starts) - 1, number):
                self._remember_start(earlier + 1, self._schedule(earlier))
            datasets = self._schedule(number)
            self._remember_start(number + 1, datasets)
            draws = np.empty(len(datasets), dtype=np.int64)
            for dataset, start in enumerate(self._starts[number]):
                here = np.flatnonzero(datasets == dataset)
                draws[here] = np.arange(start, start + len(here))
            while len(self._chunks) >= _KEPT_CHUNKS:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[number] = datasets, draws
        return self._chunks[number]

    def _remember_start(self, number: int, datasets_before: np.ndarray) -> None:
        if number == len(self._starts):
            drawn = np.bincount(datasets_before, minlength=len(self._shares)).tolist()
            self._starts.append([a + b for a, b in zip(self._starts[-1], drawn, strict=True)])

    def _schedule(self, number: int) -> np.ndarray:
        """The datasets drawn in one chunk: int64 ``(n,)``. What was drawn before it is all that it follows from."""
        first = number * _CHUNK
        stop = min(first + _CHUNK, self._period)
        period, count = self._period, len(self._shares)
        allowed: list[list[int]] = [[] for _ in range(stop - first)]
        for dataset, (share, start) in enumerate(zip(self._shares, self._starts[number], strict=True)):
            for draw in range(start, -(-stop * share // period)):
                end = -(-(draw + 1) * period // share)
                # Of equal ends the first dataset's: one number orders both.
                allowed[max(0, draw * period // share - first)].append(end * count + dataset)
        waiting: list[int] = []
        drawn = []
        for new in allowed:
            for entry in new:
                heapq.heappush(waiting, entry)
            drawn.append(heapq.heappop(waiting) % count)
        return np.array(drawn, dtype=np.int64)
