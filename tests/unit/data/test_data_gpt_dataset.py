"""Packing, splits and batches, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.batches import load_batch
from megatron_lpa.data.gpt_dataset import GPTDataset
from megatron_lpa.data.splits import open_splits, split_documents
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter
from megatron_lpa.errors import UserError


def write(prefix: Path, sizes: list[int]) -> str:
    """Documents of these sizes; token ids count up through all of them."""
    start = 0
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for size in sizes:
            writer.add_document(np.arange(start, start + size))
            start += size
    return str(prefix)


def test_packing_by_hand(tmp_path: Path) -> None:
    indexed = IndexedDataset(write(tmp_path / "d", [2, 3, 5, 1, 4]))
    # Documents 1 to 3 are tokens 2 to 10: nine tokens, so two samples of four and a label each.
    dataset = GPTDataset(indexed, (1, 4), sequence_length=4, seed=1)
    assert (dataset.num_tokens, dataset.num_samples) == (9, 2)
    assert dataset.sample(0).tolist() == [2, 3, 4, 5, 6]
    assert dataset.sample(1).tolist() == [6, 7, 8, 9, 10]
    assert dataset.sample(0).dtype == np.int64
    with pytest.raises(IndexError):
        dataset.sample(2)
    # One token fewer and the second sample has no last label.
    assert GPTDataset(indexed, (1, 3), sequence_length=4, seed=1).num_samples == 1


def test_samples_are_the_ones_megatron_cuts(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core, the peer to compare with, is not installed")
    from megatron.core.datasets.helpers import build_sample_idx

    sizes, sequence_length = np.array([7, 1, 30, 4, 12, 3], dtype=np.int32), 8
    dataset = GPTDataset(IndexedDataset(write(tmp_path / "d", sizes.tolist())), (0, 6), sequence_length, 1)
    theirs = build_sample_idx(
        sizes, np.arange(6, dtype=np.int32), sequence_length, 1, int(sizes.sum()), True, 1
    )
    starts = np.concatenate([[0], np.cumsum(sizes)])
    assert [dataset.sample(k)[0] for k in range(dataset.num_samples)] == [
        starts[document] + offset for document, offset in theirs[:-1]
    ]


def test_too_short_a_dataset_names_both_numbers(tmp_path: Path) -> None:
    indexed = IndexedDataset(write(tmp_path / "d", [4, 100]))
    GPTDataset(indexed, (0, 1), sequence_length=3, seed=1)
    with pytest.raises(UserError, match=r"hold 4 tokens, fewer than the 5 of one sample"):
        GPTDataset(indexed, (0, 1), sequence_length=4, seed=1)


def test_the_shuffled_order_has_every_sample_once_an_epoch(tmp_path: Path) -> None:
    dataset = GPTDataset(IndexedDataset(write(tmp_path / "d", [58])), (0, 1), 4, seed=27)
    assert dataset.num_samples == 14
    order = dataset.shuffled(np.arange(3 * 14)).reshape(3, 14)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(14))
    assert not np.array_equal(order[0], order[1]) and not np.array_equal(order[1], order[2])
    # Any stretch can be asked for on its own, over the end of an epoch too.
    assert dataset.shuffled(np.arange(10, 20)).tolist() == order.reshape(-1)[10:20].tolist()


@pytest.mark.parametrize("split", ["969,30,1", "98,2,0", "1", "0.5,0.5", "0,1,0", "1,1,1"])
def test_splits_are_megatrons(split: str) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core, the peer to compare with, is not installed")
    from megatron.core.datasets import blended_megatron_dataset_config as theirs

    matrix = theirs.convert_split_vector_to_split_matrix(theirs.parse_and_normalize_split(split))
    for num_documents in (1, 2, 10, 249, 1000, 29963, 210_607_728):
        for ours, share in zip(split_documents(num_documents, split), matrix, strict=True):
            if share is None:
                assert ours[0] == ours[1]
            else:
                assert ours == tuple(round(bound * num_documents) for bound in share)


def test_splits_share_no_document_and_lose_none() -> None:
    for num_documents in range(300):
        train, valid, test = split_documents(num_documents, "969,30,1")
        assert [*range(*train), *range(*valid), *range(*test)] == list(range(num_documents))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1,1", "90;10"])
def test_a_bad_split_names_the_key(split: str) -> None:
    with pytest.raises(UserError, match=r"data\.split"):
        split_documents(10, split)


def test_open_splits_of_one_prefix(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [10] * 10)
    splits = open_splits(
        DataConfig(prefix=prefix, split="7,2,1", shuffle_documents=False), sequence_length=3, seed=1
    )
    assert splits.valid is not None and splits.test is not None and splits.notes == ()
    assert [s.document_range for s in (splits.train, splits.valid, splits.test)] == [(0, 7), (7, 9), (9, 10)]
    assert splits.valid.sample(0).tolist() == [70, 71, 72, 73]


def test_empty_shares_give_none_and_say_so(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [10] * 10)
    splits = open_splits(DataConfig(prefix=prefix, split="1,0,0"), sequence_length=3, seed=1)
    assert splits.valid is None and splits.test is None
    assert ["no validation split" in note for note in splits.notes] == [True]
    # 0.1 % of few documents is often less than one sample: no reason to refuse training.
    short_test = open_splits(DataConfig(prefix=prefix, split="7,2,1"), sequence_length=12, seed=1)
    assert short_test.test is None and "10 tokens, fewer than one sample of 13" in short_test.notes[0]
    with pytest.raises(UserError, match=r"the valid documents 9 to 10 hold 10 tokens"):
        open_splits(DataConfig(prefix=prefix, split="9,1,0"), sequence_length=12, seed=1)
    with pytest.raises(UserError, match=r"leaves none of the 10 documents .* for training"):
        open_splits(DataConfig(prefix=prefix, split="0,1,0"), sequence_length=3, seed=1)


def test_open_splits_of_separate_prefixes(tmp_path: Path) -> None:
    train, valid = write(tmp_path / "t", [50]), write(tmp_path / "v", [20])
    splits = open_splits(DataConfig(train_prefix=train, valid_prefix=valid), sequence_length=3, seed=1)
    assert splits.valid is not None and splits.test is None
    assert (splits.train.num_tokens, splits.valid.num_tokens) == (50, 20)
    with pytest.raises(UserError, match=r"excludes"):
        open_splits(DataConfig(prefix=train, valid_prefix=valid), 3, 1)
    with pytest.raises(UserError, match=r"no training data: set data\.prefix"):
        open_splits(DataConfig(valid_prefix=valid), 3, 1)


def test_a_batch_is_its_samples_and_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [21])
    dataset = GPTDataset(IndexedDataset(prefix), (0, 1), 5, seed=1, name="train")
    batch = load_batch(dataset, np.array([2, 0]), vocab_size=16)
    assert batch.tolist() == [[10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5]]
    assert batch.dtype == np.int64
    with pytest.raises(UserError, match=r"d: sample 2 of train holds token id 15, .* ids 0 to 14") as caught:
        load_batch(dataset, np.array([0, 2]), vocab_size=15)
    assert "model.vocab_size" in str(caught.value)
