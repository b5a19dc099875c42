"""Blends within one sample of their weights at every prefix, against exact fractions."""

from __future__ import annotations

import heapq
import random
import time
from fractions import Fraction

import numpy as np
import pytest

from megatron_lpa.data import interleave
from megatron_lpa.data.interleave import Interleave


def normalised(weights: list[Fraction]) -> list[Fraction]:
    return [weight / sum(weights) for weight in weights]


def check_every_prefix(weights: list[Fraction], length: int) -> None:
    """``|drawn - n w| < 1`` for every dataset and every ``n`` up to ``length``, and draws count up from 0."""
    datasets, draws = Interleave(weights).locate(np.arange(length))
    for number, weight in enumerate(weights):
        drawn = np.cumsum(datasets == number)
        # |drawn - n a / b| < 1 is |drawn b - n a| < b, in whole numbers of any size.
        a, b = weight.numerator, weight.denominator
        if b < 2**40:
            assert np.all(np.abs(drawn * b - np.arange(1, length + 1) * a) < b)
        else:
            assert all(abs(int(d) * b - n * a) < b for n, d in enumerate(drawn, 1))
        assert np.array_equal(draws[datasets == number], np.arange(drawn[-1]))


def test_by_hand() -> None:
    datasets, draws = Interleave([Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]).locate(np.arange(12))
    assert datasets.tolist() == [0, 1, 0, 1, 0, 2] * 2
    assert draws.tolist() == [0, 0, 1, 1, 2, 0, 3, 2, 4, 3, 5, 1]


def test_one_dataset_is_itself() -> None:
    datasets, draws = Interleave([Fraction(1)]).locate(np.array([0, 5, 10**12]))
    assert datasets.tolist() == [0, 0, 0] and draws.tolist() == [0, 5, 10**12]


@pytest.mark.parametrize("count", [2, 3, 5, 8, 30])
@pytest.mark.parametrize("seed", range(8))
def test_weights_with_two_digits(count: int, seed: int) -> None:
    generator = random.Random(100 * count + seed)
    weights = normalised([Fraction(generator.randint(1, 99), 100) for _ in range(count)])
    check_every_prefix(weights, 20_000)


@pytest.mark.parametrize(("count", "seed"), [(2, 0), (3, 1), (7, 2), (30, 3), (30, 4)])
def test_weights_with_many_digits(count: int, seed: int) -> None:
    generator = random.Random(seed)
    weights = normalised([Fraction(str(generator.random())) for _ in range(count)])
    check_every_prefix(weights, 3000)


@pytest.mark.parametrize("seed", range(6))
def test_weights_of_all_sizes(seed: int) -> None:
    """One large dataset among small ones, and weights over several orders of magnitude."""
    generator = random.Random(seed)
    weights = normalised([Fraction(1000), *(Fraction(generator.randint(1, 40)) for _ in range(29))])
    check_every_prefix(weights, 10_000)
    check_every_prefix(normalised([Fraction(generator.randint(1, 9), 2**i) for i in range(12)]), 10_000)


def test_always_drawing_the_one_furthest_behind_would_not_do() -> None:
    """The case that the scheduling is for: the simple rule misses the bound, ours does not."""
    weights = normalised([Fraction(w) for w in (300, 5, 3, 300, 2, 3, 120, 3)])
    drawn, worst = [0] * len(weights), Fraction(0)
    for n in range(1, 401):
        behind = [n * w - d for w, d in zip(weights, drawn, strict=True)]
        drawn[behind.index(max(behind))] += 1
        worst = max(worst, *(abs(n * w - d) for w, d in zip(weights, drawn, strict=True)))
    assert worst > 1
    check_every_prefix(weights, 5000)


def test_any_position_can_be_asked_for_alone_and_in_any_order() -> None:
    for weights in (
        normalised([Fraction(w, 100) for w in (7, 55, 38)]),
        normalised([Fraction(str(w)) for w in (0.1234567890123, 0.4, 0.7182818284)]),
        normalised([Fraction(w) for w in (1, 2, 3 * 2**66)]),  # a period beyond 64 bits
    ):
        datasets, draws = Interleave(weights).locate(np.arange(140_000))
        positions = np.array([139_999, 3, 65_536, 65_535, 131_072, 0, 100])
        alone = Interleave(weights)
        for position in positions:
            dataset, draw = alone.locate(np.array([position]))
            assert (dataset[0], draw[0]) == (datasets[position], draws[position])
        together = Interleave(weights).locate(positions)
        assert np.array_equal(together[0], datasets[positions])
        assert np.array_equal(together[1], draws[positions])


def test_far_positions_of_a_short_period_cost_nothing() -> None:
    weights = [Fraction(3, 10), Fraction(7, 10)]
    datasets, draws = Interleave(weights).locate(10**15 + np.arange(10))
    near = Interleave(weights).locate(np.arange(10))
    assert np.array_equal(datasets, near[0])
    assert np.array_equal(draws, near[1] + 10**14 * np.array([3, 7])[near[0]])


def in_sequence(weights: list[Fraction], length: int) -> list[int]:
    """The rule of the module's docstring, followed from position 0 in fractions."""
    pending: list[tuple[int, int]] = []
    next_draw = [0] * len(weights)
    order = []
    for position in range(length):
        for dataset, weight in enumerate(weights):
            while next_draw[dataset] / weight < position + 1:  # floor(k / w) <= position
                next_draw[dataset] += 1
                heapq.heappush(pending, (-(-next_draw[dataset] // weight), dataset))
        order.append(heapq.heappop(pending)[1])
    return order


@pytest.mark.parametrize("seed", range(12))
def test_a_jump_arrives_where_the_sequence_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows and chunks so small that every position is jumped to, from brackets that have yet to
    meet."""
    monkeypatch.setattr(interleave, "_CHUNK", 16)
    monkeypatch.setattr(interleave, "_BLOCK", 8)
    monkeypatch.setattr(interleave, "_WINDOW", 4)
    generator = random.Random(seed)
    raw = [
        [Fraction(str(generator.random())) for _ in range(2 + seed)],
        [Fraction(str(10 ** (-2.5 * generator.random()))) for _ in range(2 + seed)],  # of all sizes
        [Fraction(generator.randint(1, 9)) for _ in range(2 + seed)],  # many equal ends
    ][seed % 3]
    weights = normalised(raw)
    order = in_sequence(weights, 3000)
    positions = generator.sample(range(3000), 120)
    jumping = Interleave(weights)
    for position in positions:
        dataset, draw = jumping.locate(np.array([position]))
        assert dataset[0] == order[position]
        assert draw[0] == order[:position].count(order[position])


def test_far_positions_cost_nothing_whatever_the_period() -> None:
    generator = random.Random(5)
    weights = normalised([Fraction(str(generator.random())) for _ in range(20)])
    started = time.process_time()
    far = 10**14 + np.arange(1000)
    datasets, draws = Interleave(weights).locate(far)
    assert time.process_time() - started < 5  # one by one it would be years
    for number, weight in enumerate(weights):
        for position, draw in zip(far[datasets == number], draws[datasets == number], strict=True):
            assert abs(int(draw) + 1 - (int(position) + 1) * weight) < 1
    # Coming from another side, over several chunks, gives the same.
    around = Interleave(weights).locate(np.arange(far[0] - 200_000, far[0] + 1000))
    assert np.array_equal(around[0][-1000:], datasets) and np.array_equal(around[1][-1000:], draws)


def test_a_tiny_weight_needs_a_long_look_back_and_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = []
    real = Interleave._open
    monkeypatch.setattr(Interleave, "_open", lambda self, n: windows.append(n) or real(self, n))
    weights = normalised([Fraction("0.3141592653"), Fraction("0.577215664901"), Fraction("0.00007")])
    datasets, draws = Interleave(weights).locate(np.arange(200_000))
    windows.clear()
    position = 2 * (1 << 16)
    alone = Interleave(weights).locate(np.arange(position, position + 3000))
    assert len(windows) > 2 and np.array_equal(alone[0], datasets[position : position + 3000])
    assert np.array_equal(alone[1], draws[position : position + 3000])


def test_golden_order() -> None:
    """If this fails, running experiments would silently see other data: do not change the numbers."""
    weights = normalised([Fraction(w) for w in (5, 3, 2, 2)])
    assert "".join(map(str, Interleave(weights).locate(np.arange(24))[0])) == "010230101023010230101023"
