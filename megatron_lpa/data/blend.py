"""Several datasets read as one, each with a share of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_lpa.data.gpt_dataset import GPTDataset
from megatron_lpa.data.interleave import Interleave


class Blend:
    """Samples of several datasets in fixed proportions, in a fixed order.

    After any number of samples each dataset has given its share to within one sample (``interleave.py``).
    Each goes through its own samples in its own order, and through its own epochs, whatever the others do.

    An index numbers the samples of all datasets, one dataset after the other.

    Args:
        datasets: of one split and one sequence length. Where the end of two draws' time is equal the earlier
            dataset comes first, so their order is part of the blend's.
        weights: share of each, above 0, their sum 1.
        name: which split this is, for messages.
    """

    def __init__(self, datasets: Sequence[GPTDataset], weights: Sequence[Fraction], name: str) -> None:
        assert len({dataset.sequence_length for dataset in datasets}) == 1
        self.datasets = tuple(datasets)
        self.weights = tuple(weights)
        self.name = name
        self.sequence_length = datasets[0].sequence_length
        # Of n samples with n w at most a dataset's, that dataset gives at most ceil(n w) of its own.
        self.num_samples: int = min(
            int(dataset.num_samples / weight) for dataset, weight in zip(datasets, weights, strict=True)
        )
        self._interleave = Interleave(weights)
        self._bases = np.cumsum([0, *(dataset.num_samples for dataset in datasets)])

    @property
    def parts(self) -> tuple[tuple[str, Fraction, int], ...]:
        """Every dataset: prefix, share, and samples that it holds."""
        return tuple(
            (dataset.indexed.prefix, weight, dataset.num_samples)
            for dataset, weight in zip(self.datasets, self.weights, strict=True)
        )

    def giving(self, num_samples: int) -> list[tuple[GPTDataset, int]]:
        """Every dataset, and how many of the first ``num_samples`` of the plain order it gives: its own first
        ones."""
        datasets, _ = self._interleave.locate(np.arange(num_samples, dtype=np.int64))
        given = np.bincount(datasets, minlength=len(self.datasets)).tolist()
        return list(zip(self.datasets, given, strict=True))

    def shuffled(self, positions: np.ndarray) -> np.ndarray:
        """The index at each position of the endless shuffled order: int64 ``(n,)`` to int64 ``(n,)``."""
        datasets, draws = self._interleave.locate(np.asarray(positions, dtype=np.int64))
        indices = np.empty_like(draws)
        for number in np.unique(datasets).tolist():
            here = datasets == number
            indices[here] = self._bases[number] + self.datasets[number].shuffled(draws[here])
        return indices

    def in_order(self, positions: np.ndarray) -> np.ndarray:
        """The index at each position with every dataset read in order: int64 ``(n,)`` to int64 ``(n,)``."""
        datasets, draws = self._interleave.locate(np.asarray(positions, dtype=np.int64))
        return self._bases[datasets] + draws

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Samples by index: int64 ``(b,)`` to int64 ``(b, S + 1)``."""
        tokens = np.empty((len(indices), self.sequence_length + 1), dtype=np.int64)
        datasets = np.searchsorted(self._bases, indices, side="right") - 1
        for number in np.unique(datasets).tolist():
            if not 0 <= number < len(self.datasets):
                raise IndexError(
                    f"sample {indices.min()} or {indices.max()} of {self._bases[-1]} in {self.name}"
                )
            here = datasets == number
            tokens[here] = self.datasets[number].read(indices[here] - self._bases[number])
        return tokens

    def origin(self, index: int) -> str:
        """Where a sample comes from, in words for a message."""
        number = int(np.searchsorted(self._bases, index, side="right")) - 1
        return self.datasets[number].origin(index - int(self._bases[number]))

    def facts(self) -> dict[str, Any]:
        """All that the orders depend on besides the seed, as JSON; paths and dates have no part in it."""
        return {
            f"dataset_{number}": {"weight": str(weight), **dataset.facts()}
            for number, (dataset, weight) in enumerate(zip(self.datasets, self.weights, strict=True))
        }
