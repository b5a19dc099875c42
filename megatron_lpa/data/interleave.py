"""Which of several datasets each sample of a blend comes from.

After any ``n`` draws dataset ``i`` of weight ``w`` has been drawn within one sample of ``n w``. That is the
chairman assignment problem (Tijdeman, 1980). It is solved as periodic tasks are scheduled fairly (Baruah and
others, 1996): draw ``k`` of the dataset may come at position ``floor(k / w)`` at the earliest, has to come
before ``ceil((k + 1) / w)``, and of the draws allowed at a position the one with the earliest end is taken.
Always drawing the dataset furthest behind is simpler and misses the bound with many datasets.

Arithmetic is in whole numbers, so the result is exact for any weights. The order repeats after as many draws
as the weights' common denominator.

Going to position ``n`` does not need all draws before it. Let a draw be *open* at ``n`` if it is allowed
before ``n`` and has to come before some end after ``n``, and *waiting* if it is allowed before ``n`` but not
done. Draw ``k`` is allowed before ``n`` if ``k < n w``, and has its end at ``n`` or before if ``k + 1 <= n
w``. So:

* ends are met, as the bound says, so ``floor(n w)`` draws of each dataset are surely done, and at most one,
  of number ``floor(n w)``, is open: if ``n w`` is not whole;
* ``n`` draws are done in all, so of the open draws ``n - sum(floor(n w))`` are done and the others, whose
  number is thus known, are waiting. Nothing else is waiting. Only *which* of the open draws wait is history.

Write a set of waiting draws as its ends in ascending order (ties broken by the dataset, so that all differ),
and call one set below another of the same size if it is so place by place. The lowest set possible is that of
the open draws with the earliest ends, the highest that of the latest. A position adds the same newly allowed
draws to every set, which keeps sets in their relation, and takes the first of each away, which keeps it too.
So whatever was waiting at ``n``, it stays between what becomes of the lowest and of the highest; and once
these two are equal, it is they. (Propp and Wilson, 1996, sample from Markov chains in this way.) They meet
after some multiple of the largest ``1 / w`` at most in every case tried; where a window is too short for it,
a longer one is taken, in the end all positions from 0, where nothing is waiting.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_CHUNK = 1 << 16
_KEPT_CHUNKS = 8
_WINDOW = 1 << 10  # positions to look back at first
_BLOCK = 1 << 12


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
        # The position after the newest chunk, and what waits there: most often it is the next to go to.
        self._waiting: tuple[int, list[int]] = (0, [])
        self._chunks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which dataset is drawn at each position, and for which time, from 0.

        Going to a position far from the last ones takes a tenth of a second, and more only if a weight is
        below about 1e-5: then some microseconds times its inverse.

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
            first = number * _CHUNK
            stop = min(first + _CHUNK, self._period)
            known, waiting = self._waiting
            waiting = list(waiting) if known == first else self._waiting_at(first)
            starts = self._drawn(first, waiting)
            datasets = np.array(self._draw(waiting, self._allowed(first, stop)), dtype=np.int64)
            self._waiting = (stop, waiting)
            draws = np.empty(len(datasets), dtype=np.int64)
            for dataset, start in enumerate(starts):
                here = np.flatnonzero(datasets == dataset)
                draws[here] = np.arange(start, start + len(here))
            while len(self._chunks) >= _KEPT_CHUNKS:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[number] = datasets, draws
        return self._chunks[number]

    def _waiting_at(self, position: int) -> list[int]:
        """The draws waiting at a position, as a heap."""
        window = _WINDOW
        while True:
            first = max(0, position - window)
            done = first - sum(first * share // self._period for share in self._shares)
            open_draws = sorted(entry for entry in self._open(first) if entry is not None)
            # Ascending, and so heaps. At position 0 both are empty.
            lowest, highest = open_draws[: len(open_draws) - done], open_draws[done:]
            met = lowest == highest
            for start in range(first, position, _BLOCK):
                allowed = self._allowed(start, min(start + _BLOCK, position))
                self._draw(lowest, allowed)
                if not met:
                    self._draw(highest, allowed)
                    met = sorted(lowest) == sorted(highest)
            if met:
                return lowest
            window *= 4

    def _open(self, position: int) -> list[int | None]:
        """Each dataset's open draw, if it has one."""
        return [
            self._entry(dataset, position * share // self._period)
            if position * share % self._period
            else None
            for dataset, share in enumerate(self._shares)
        ]

    def _drawn(self, position: int, waiting: list[int]) -> list[int]:
        """How often each dataset has been drawn before a position."""
        return [
            position * share // self._period + (entry is not None and entry not in waiting)
            for share, entry in zip(self._shares, self._open(position), strict=True)
        ]

    def _entry(self, dataset: int, draw: int) -> int:
        """A draw as one number: its end and, of equal ends, the first dataset's first."""
        return -(-(draw + 1) * self._period // self._shares[dataset]) * len(self._shares) + dataset

    def _allowed(self, first: int, stop: int) -> list[list[int]]:
        """The draws newly allowed at each position from ``first`` to ``stop``."""
        period, count = self._period, len(self._shares)
        allowed: list[list[int]] = [[] for _ in range(stop - first)]
        for dataset, share in enumerate(self._shares):
            for draw in range(-(-first * share // period), -(-stop * share // period)):
                end = -(-(draw + 1) * period // share)
                allowed[draw * period // share - first].append(end * count + dataset)
        return allowed

    def _draw(self, waiting: list[int], allowed: list[list[int]]) -> list[int]:
        """Goes through positions, changing the heap ``waiting``; the dataset drawn at each."""
        count, drawn = len(self._shares), []
        for new in allowed:
            for entry in new:
                heapq.heappush(waiting, entry)
            drawn.append(heapq.heappop(waiting) % count)
        return drawn
