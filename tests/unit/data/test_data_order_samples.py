"""The shuffle: a bijection, fixed for ever, and random enough."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lpa.data.order import permuted


def order(size: int, seed: int = 27, epoch: int = 0) -> np.ndarray:
    return permuted(np.arange(size), size, seed, np.full(size, epoch))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 1000, 1024, 65537])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (27, 3), (2**63 - 1, 10**9)])
def test_every_position_is_taken_exactly_once(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(order(size, seed, epoch)), np.arange(size))


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    orders = [order(1000, seed, epoch) for seed in (0, 1, 27) for epoch in (0, 1, 2)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert np.mean(first == second) < 0.01
    assert np.array_equal(order(1000, 1, 2), orders[5])


def test_one_position_alone_lands_where_it_lands_among_others() -> None:
    together = permuted(np.array([4, 0, 4, 6]), 7, 27, np.array([0, 1, 2, 0]))
    alone = [permuted(np.array([p]), 7, 27, np.array([e]))[0] for p, e in ((4, 0), (0, 1), (4, 2), (6, 0))]
    assert together.tolist() == alone


def test_golden_order() -> None:
    """If this fails, running experiments would silently see other data: do not change the numbers."""
    assert order(10, 27, 0).tolist() == [6, 9, 4, 2, 3, 7, 5, 0, 1, 8]
    assert order(10, 27, 1).tolist() == [4, 3, 1, 6, 8, 0, 9, 5, 2, 7]
    assert order(7, 0, 0).tolist() == [3, 0, 4, 1, 2, 6, 5]
    assert order(65537, 27)[:4].tolist() == [54562, 54597, 39888, 65158]
    assert permuted(np.arange(3), 12_500_000, 27, np.full(3, 3)).tolist() == [6629326, 8746780, 5926944]
    huge = permuted(np.arange(3), 51_200_000_000, 27, np.zeros(3, dtype=np.int64))
    assert huge.tolist() == [45619316483, 6176842951, 50290565178]


@pytest.mark.parametrize("size", [3, 7, 12])
def test_over_many_epochs_each_sample_comes_at_each_place_equally_often(size: int) -> None:
    epochs = 20_000
    places = permuted(np.tile(np.arange(size), epochs), size, 27, np.repeat(np.arange(epochs), size)).reshape(
        epochs, size
    )
    counts = np.stack([np.bincount(places[:, j], minlength=size) for j in range(size)])
    chi_squared = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    degrees = (size - 1) ** 2
    assert chi_squared < degrees + 5 * np.sqrt(2 * degrees)


def test_neighbours_in_the_text_are_not_neighbours_in_the_order() -> None:
    size = 100_003
    shuffled = order(size)
    for other in (np.arange(size), np.roll(shuffled, 1), order(size, epoch=1), order(size, seed=28)):
        assert abs(np.corrcoef(shuffled, other)[0, 1]) < 5 / np.sqrt(size)
