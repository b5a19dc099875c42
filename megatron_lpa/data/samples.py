"""What training and evaluation ask of their data, be it one dataset or a blend."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from megatron_lpa.data.gpt_dataset import GPTDataset


class Samples(Protocol):
    """Samples of ``sequence_length`` + 1 ids in two orders: the shuffled one for training, and their own.

    Positions of an order become *indices*, and indices become ids.
    """

    @property
    def name(self) -> str:
        """Which split this is: train, valid or test."""

    @property
    def sequence_length(self) -> int:
        """S, tokens per sequence."""

    @property
    def num_samples(self) -> int:
        """Samples that can be read from the start of either order before anything comes a second time."""

    @property
    def parts(self) -> tuple[tuple[str, Fraction, int], ...]:
        """Every dataset behind it: prefix, share of the samples, and samples that it holds."""

    def giving(self, num_samples: int) -> list[tuple[GPTDataset, int]]:
        """Every dataset behind it, and how many of the first ``num_samples`` of the plain order it gives."""

    def shuffled(self, positions: np.ndarray) -> np.ndarray:
        """The index at each position of the endless shuffled order: int64 ``(n,)`` to int64 ``(n,)``."""

    def in_order(self, positions: np.ndarray) -> np.ndarray:
        """The index at each position, below ``num_samples``, of the plain order: int64 ``(n,)`` to int64
        ``(n,)``."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Samples by index: int64 ``(b,)`` to int64 ``(b, S + 1)``."""

    def origin(self, index: int) -> str:
        """Where a sample comes from, in words for a message."""

    def facts(self) -> dict[str, Any]:
        """All that the orders depend on besides the seed, as JSON; paths and dates have no part in it."""
