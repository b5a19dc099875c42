"""Blends of datasets: proportions, epochs of their own, and the same samples whoever reads them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_lpa.data.batches import load_batch, micro_batch_indices
from megatron_lpa.data.blend import Blend
from megatron_lpa.data.gpt_dataset import GPTDataset
from megatron_lpa.data.samples import Samples
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter
from megatron_lpa.errors import UserError

S = 4
SAMPLES = (10, 3, 25)
WEIGHTS = (Fraction(1, 2), Fraction(1, 5), Fraction(3, 10))


def dataset(folder: Path, number: int, num_samples: int) -> GPTDataset:
    """Sample ``k`` of dataset ``number`` begins with id ``1000 number + 4 k``."""
    prefix = folder / f"d{number}"
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        writer.add_document(1000 * number + np.arange(num_samples * S + 1))
    return GPTDataset(IndexedDataset(prefix), (0, 1), S, seed=7, name="train")


@pytest.fixture
def blend(tmp_path: Path) -> Blend:
    return Blend([dataset(tmp_path, i, n) for i, n in enumerate(SAMPLES)], WEIGHTS, "train")


def origins(samples: Samples, indices: np.ndarray) -> list[tuple[int, int]]:
    """(dataset, sample) of each index, from the ids read."""
    return [(int(first) // 1000, int(first) % 1000 // S) for first in samples.read(indices)[:, 0]]


def test_every_dataset_goes_through_its_own_epochs_in_its_own_order(blend: Blend) -> None:
    read = origins(blend, blend.shuffled(np.arange(200)))
    for number, part in enumerate(blend.datasets):
        own = [sample for source, sample in read if source == number]
        assert len(own) == 200 * WEIGHTS[number]
        assert own == part.shuffled(np.arange(len(own))).tolist()
        for epoch in range(len(own) // SAMPLES[number]):
            chunk = own[epoch * SAMPLES[number] : (epoch + 1) * SAMPLES[number]]
            assert sorted(chunk) == list(range(SAMPLES[number]))


def test_proportions_hold_at_every_prefix(blend: Blend) -> None:
    sources = np.array([source for source, _ in origins(blend, blend.shuffled(np.arange(300)))])
    for number, weight in enumerate(WEIGHTS):
        for n, drawn in enumerate(np.cumsum(sources == number), 1):
            assert abs(int(drawn) - n * weight) < 1


def test_giving_counts_what_the_plain_order_reads(blend: Blend) -> None:
    for length in (0, 1, 7, 15):
        sources = (
            [source for source, _ in origins(blend, blend.in_order(np.arange(length)))] if length else []
        )
        assert blend.giving(length) == [(part, sources.count(i)) for i, part in enumerate(blend.datasets)]
    assert blend.datasets[0].giving(4) == [(blend.datasets[0], 4)]


def test_in_order_nothing_comes_twice(blend: Blend) -> None:
    assert blend.num_samples == 15  # 3 samples at a fifth; 10 / (1/2) and 25 / (3/10) would be more
    read = origins(blend, blend.in_order(np.arange(blend.num_samples)))
    assert len(set(read)) == len(read)
    for number in range(3):
        own = [sample for source, sample in read if source == number]
        assert own == list(range(len(own)))
    # The shuffled order repeats nothing that early either.
    assert len(set(blend.shuffled(np.arange(15)).tolist())) == 15


@pytest.mark.parametrize(
    ("samples", "weights"), [((7, 7, 7), (1, 1, 1)), ((1, 50), (1, 99)), ((9, 2, 5), (3, 1, 4))]
)
def test_num_samples_is_the_most_that_surely_repeats_nothing(
    tmp_path: Path, samples: tuple[int, ...], weights: tuple[int, ...]
) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    blend = Blend([dataset(tmp_path, i, n) for i, n in enumerate(samples)], shares, "valid")
    assert len(set(blend.in_order(np.arange(blend.num_samples)).tolist())) == blend.num_samples
    assert any((blend.num_samples + 1) * share > held for share, held in zip(shares, samples, strict=True))


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 4), (2, 2), (4, 2), (8, 1), (1, 8)])
def test_resuming_in_another_layout_goes_on_with_the_next_sample(
    blend: Blend, micro_batch_size: int, dp_size: int
) -> None:
    """Three steps of one process, then three of another layout, are six steps of either."""
    batch = 8
    whole = blend.read(blend.shuffled(np.arange(6 * batch)))
    for step in range(3, 6):
        ranks = [
            micro_batch_indices(step * batch, batch, micro_batch_size, rank, dp_size)
            for rank in range(dp_size)
        ]
        read = [
            blend.read(blend.shuffled(ranks[rank][micro]))
            for micro in range(len(ranks[0]))
            for rank in range(dp_size)
        ]
        assert np.concatenate(read).tolist() == whole[step * batch : (step + 1) * batch].tolist()


def test_a_bad_id_names_its_dataset(blend: Blend) -> None:
    indices = blend.shuffled(np.arange(20))
    with pytest.raises(UserError, match=r"d2: sample \d+ of train holds token id 2\d\d\d, .* ids 0 to 1999"):
        load_batch(blend, indices, vocab_size=2000)
    assert load_batch(blend, indices, vocab_size=3000).shape == (20, S + 1)
    with pytest.raises(IndexError):
        blend.read(np.array([sum(SAMPLES)]))


def test_facts_tell_weights_and_contents_but_no_paths(blend: Blend, tmp_path: Path) -> None:
    facts = blend.facts()
    assert [facts[f"dataset_{i}"]["weight"] for i in range(3)] == ["1/2", "1/5", "3/10"]
    assert len({facts[f"dataset_{i}"]["contents"] for i in range(3)}) == 3
    assert str(tmp_path) not in str(facts)
