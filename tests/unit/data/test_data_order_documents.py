"""The order of documents: a bijection, fixed for ever, and random enough."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lpa.data.order import DocumentOrder


def order(size: int, seed: int = 1) -> np.ndarray:
    return DocumentOrder(size, seed).range(0, size).astype(np.int64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 1000, 1024, 1025, 65536, 65537, 300_001])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_every_document_comes_exactly_once(size: int, seed: int) -> None:
    assert np.array_equal(np.sort(order(size, seed)), np.arange(size))


def test_a_part_is_the_part_of_the_whole() -> None:
    whole, shuffle = order(5000, 3), DocumentOrder(5000, 3)
    assert np.array_equal(shuffle.range(1234, 1300), whole[1234:1300])
    positions = np.array([4999, 0, 17, 17])
    assert np.array_equal(shuffle.at(positions), whole[positions])
    assert shuffle.range(7, 7).size == 0


def test_the_largest_dataset_and_seed() -> None:
    shuffle = DocumentOrder(1 << 32, 2**63 - 1)
    found = shuffle.range((1 << 32) - 1000, 1 << 32)
    assert len(set(found.tolist())) == 1000 and found.dtype == np.uint32
    shuffle = DocumentOrder((1 << 32) - 5, 0)
    assert int(shuffle.range(0, 100_000).max()) < (1 << 32) - 5


def test_golden_order() -> None:
    """If this fails, running experiments would hold out and read other documents: do not change the
    numbers."""
    assert order(10).tolist() == [7, 6, 5, 4, 0, 8, 3, 9, 1, 2]
    assert DocumentOrder(51_200_000, 1).range(0, 4).tolist() == [6797489, 28371417, 5072858, 35345235]
    assert DocumentOrder(65537, 27).range(65533, 65537).tolist() == [61483, 42378, 63929, 7015]


@pytest.mark.parametrize("size", [3, 7, 12, 16])
def test_over_many_seeds_each_document_comes_at_each_place_equally_often(size: int) -> None:
    seeds = 6000
    places = np.stack([order(size, seed) for seed in range(seeds)])
    counts = np.stack([np.bincount(places[:, j], minlength=size) for j in range(size)])
    chi_squared = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
    degrees = (size - 1) ** 2
    assert chi_squared < degrees + 5 * np.sqrt(2 * degrees)


def test_over_many_seeds_pairs_of_documents_are_neighbours_equally_often() -> None:
    size, seeds = 11, 8000
    places = np.stack([order(size, seed) for seed in range(seeds)])
    pairs = np.bincount((places[:, :-1] * size + places[:, 1:]).ravel(), minlength=size * size)
    counts = pairs.reshape(size, size)[~np.eye(size, dtype=bool)]
    expected = seeds * (size - 1) / (size * (size - 1))
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    degrees = len(counts) - 1
    assert abs(chi_squared - degrees) < 6 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("size", [1 << 17, 200_003, (1 << 18) + 1])
def test_neighbours_in_the_file_are_not_neighbours_in_the_order(size: int) -> None:
    shuffled = order(size)
    for other in (np.arange(size), np.roll(shuffled, 1), order(size, seed=2)):
        assert abs(np.corrcoef(shuffled, other)[0, 1]) < 5 / np.sqrt(size)
    # Distances between neighbours: as between any two of a uniform order, not many short or equal ones.
    steps = np.abs(np.diff(shuffled))
    assert abs(steps.mean() / size - 1 / 3) < 5 / np.sqrt(size)
    short = np.mean(steps <= size // 1000)
    assert 0.001 < short < 0.003
    assert np.unique(np.diff(shuffled)).size > 0.5 * size


@pytest.mark.parametrize("size", [1 << 17, 200_003])
def test_a_range_of_positions_is_a_uniform_sample(size: int) -> None:
    """The held-out documents come from all over the file, whichever low or high bits they share."""
    start = size - size // 33
    held_out = DocumentOrder(size, 1).range(start, size).astype(np.int64)
    for values, bins in ((held_out * 64 // size, 64), (held_out % 64, 64), ((held_out // 512) % 32, 32)):
        counts = np.bincount(values, minlength=bins)
        chi_squared = ((counts - len(held_out) / bins) ** 2 / (len(held_out) / bins)).sum()
        assert chi_squared < bins + 6 * np.sqrt(2 * bins)
