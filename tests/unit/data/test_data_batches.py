"""Which process reads what, whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lpa.data.batches import evaluation_indices, micro_batch_indices

LAYOUTS = [(1, 24), (1, 3), (2, 4), (2, 1), (4, 6), (4, 2), (8, 3)]  # (dp_size, micro_batch_size)


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), LAYOUTS)
@pytest.mark.parametrize("consumed", [0, 24, 37])
def test_the_global_batch_is_the_same_in_the_same_order(
    dp_size: int, micro_batch_size: int, consumed: int
) -> None:
    ranks = [micro_batch_indices(consumed, 24, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
    assert all(len(steps) == 24 // (dp_size * micro_batch_size) for steps in ranks)
    in_order = [
        index for micro_step in zip(*ranks, strict=True) for indices in micro_step for index in indices
    ]
    assert in_order == list(range(consumed, consumed + 24))


def test_by_hand() -> None:
    batches = micro_batch_indices(
        consumed_samples=100, global_batch_size=8, micro_batch_size=2, dp_rank=1, dp_size=2
    )
    assert [batch.tolist() for batch in batches] == [[102, 103], [106, 107]]
    assert all(batch.dtype == np.int64 for batch in batches)


def test_a_run_resumed_on_other_processes_reads_what_the_first_would_have() -> None:
    def read(steps: list[tuple[int, int]]) -> list[int]:
        consumed = 0
        seen: list[int] = []
        for dp_size, micro_batch_size in steps:
            ranks = [micro_batch_indices(consumed, 8, micro_batch_size, r, dp_size) for r in range(dp_size)]
            seen += sorted(np.concatenate([np.concatenate(rank) for rank in ranks]).tolist())
            consumed += 8
        return seen

    assert read([(2, 2)] * 4) == read([(2, 2), (1, 8), (4, 1), (8, 1)])


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), LAYOUTS)
@pytest.mark.parametrize("num_samples", [1, 5, 23, 24, 25, 100])
def test_evaluation_counts_every_sample_once(dp_size: int, micro_batch_size: int, num_samples: int) -> None:
    ranks = [list(evaluation_indices(num_samples, micro_batch_size, r, dp_size)) for r in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1  # or collectives would hang
    counts = np.zeros(num_samples)
    for indices, weights in (batch for batches in ranks for batch in batches):
        assert indices.shape == weights.shape == (micro_batch_size,)
        np.add.at(counts, indices, weights)
    assert counts.tolist() == [1.0] * num_samples


def test_evaluation_mean_does_not_depend_on_the_layout() -> None:
    losses = np.random.default_rng(0).random(101)
    for dp_size, micro_batch_size in LAYOUTS:
        total = weight = 0.0
        for rank in range(dp_size):
            for indices, weights in evaluation_indices(101, micro_batch_size, rank, dp_size):
                total, weight = total + float(losses[indices] @ weights), weight + float(weights.sum())
        assert total / weight == pytest.approx(losses.mean(), rel=1e-12)
