"""Samples of shuffled documents against packing in plain Python."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_lpa.data import packing
from megatron_lpa.data.gpt_dataset import PackedDocuments
from megatron_lpa.data.order import DocumentOrder
from megatron_lpa.data.packing import read_document_sizes, sample_starts
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


def write_by_sequences(prefix: Path, documents: list[list[int]]) -> str:
    """Documents of several sequences, or none, as Megatron's tools write them."""
    sizes = np.array([size for document in documents for size in document], dtype="<i4")
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * 4
    indices = np.cumsum([0, *map(len, documents)], dtype="<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(sizes), len(indices))
    Path(f"{prefix}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + indices.tobytes())
    Path(f"{prefix}.bin").write_bytes(np.arange(sizes.sum(), dtype="<i4").tobytes())
    return str(prefix)


def packed_in_python(
    indexed: IndexedDataset, order: DocumentOrder, start: int, stop: int, sequence_length: int
) -> list[list[int]]:
    stream = [
        int(token)
        for document in order.range(start, stop).tolist()
        for token in indexed.document(int(document))
    ]
    return [
        stream[first : first + sequence_length + 1]
        for first in range(0, len(stream) - sequence_length, sequence_length)
    ]


def check(indexed: IndexedDataset, start: int, stop: int, sequence_length: int, seed: int) -> None:
    order = DocumentOrder(indexed.num_documents, seed)
    sizes = read_document_sizes(indexed)
    starts, num_tokens = sample_starts(sizes, order, (start, stop), sequence_length)
    expected = packed_in_python(indexed, order, start, stop, sequence_length)
    assert num_tokens == sum(len(indexed.document(int(d))) for d in order.range(start, stop))
    assert len(starts) == (len(expected) + 1 if expected else 0)
    if expected:
        packed = PackedDocuments(indexed, order, starts, sequence_length)
        assert packed.read(np.arange(len(expected))).tolist() == expected
        backwards = np.arange(len(expected))[::-1]
        assert packed.read(backwards).tolist() == expected[::-1]


@pytest.mark.parametrize("sequence_length", [1, 2, 3, 7, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_against_plain_python(tmp_path: Path, sequence_length: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Single tokens, odd lengths, and documents of many samples.
    sizes = generator.choice([1, 1, 2, 3, 5, 13, 31, 200], size=97).tolist()
    indexed = IndexedDataset(write(tmp_path / "d", sizes))
    for start, stop in ((0, 97), (0, 90), (90, 97), (40, 41), (50, 50)):
        check(indexed, start, stop, sequence_length, seed)


@pytest.mark.parametrize("block", [1, 2, 7])
def test_blocks_join_without_a_seam(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BLOCK_DOCUMENTS", block)
    monkeypatch.setattr(packing, "_READ_DOCUMENTS", block)
    sizes = np.random.default_rng(0).integers(1, 9, size=40).tolist()
    for sequence_length in (1, 4, 30):
        check(IndexedDataset(write(tmp_path / "d", sizes)), 0, 40, sequence_length, 5)
        check(IndexedDataset(f"{tmp_path}/d"), 3, 38, sequence_length, 5)


@pytest.mark.parametrize("block", [2, 1 << 20])
def test_documents_of_several_sequences_and_of_none(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_READ_DOCUMENTS", block)
    documents = [[], [3, 4], [5], [], [], [1, 1, 0, 9], [2], [20], [0], []]
    indexed = IndexedDataset(write_by_sequences(tmp_path / "d", documents))
    assert read_document_sizes(indexed).tolist() == [sum(document) for document in documents]
    for seed in range(5):
        for sequence_length in (1, 3, 6, 40):
            check(indexed, 0, 10, sequence_length, seed)
    # As many sequences as documents, but not one each.
    indexed = IndexedDataset(write_by_sequences(tmp_path / "e", [[], [3, 4], [5], [2]]))
    assert read_document_sizes(indexed).tolist() == [0, 7, 5, 2]
    check(indexed, 0, 4, 2, 1)


def test_samples_are_the_ones_megatron_cuts_from_the_same_order(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core, the peer to compare with, is not installed")
    from megatron.core.datasets.helpers import build_sample_idx
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirDataset

    sizes = np.random.default_rng(3).integers(1, 50, size=300)
    prefix = write(tmp_path / "d", sizes.tolist())
    indexed, order, sequence_length = IndexedDataset(prefix), DocumentOrder(300, 1), 32
    documents = order.range(0, 280).astype(np.int32)
    theirs = TheirDataset(prefix)
    num_tokens = int(sizes[documents].sum())
    index = build_sample_idx(theirs.sequence_lengths, documents, sequence_length, 1, num_tokens, True, 1)
    starts, _ = sample_starts(read_document_sizes(indexed), order, (0, 280), sequence_length)
    assert len(index) == len(starts)
    packed = PackedDocuments(indexed, order, starts, sequence_length)
    for sample in range(len(starts) - 1):
        (first, begin), (last, end) = index[sample], index[sample + 1]
        pieces = [
            theirs.get(
                int(documents[position]),
                offset=int(begin) if position == first else 0,
                length=(int(end) + 1 if position == last else int(sizes[documents[position]]))
                - (int(begin) if position == first else 0),
            )
            for position in range(first, last + 1)
        ]
        assert packed.read(np.array([sample]))[0].tolist() == np.concatenate(pieces).tolist()


def test_an_index_of_other_files_is_found_out(tmp_path: Path) -> None:
    order = DocumentOrder(30, 1)
    indexed = IndexedDataset(write(tmp_path / "d", [5] * 30))
    starts, _ = sample_starts(read_document_sizes(indexed), order, (0, 30), 8)
    for sizes in ([6] * 30, [4] * 30, [1] * 15 + [9] * 15):
        other = IndexedDataset(write(tmp_path / "other", sizes))
        packed = PackedDocuments(other, order, starts, 8)
        with pytest.raises(UserError, match=r"other: its documents are not those that its sample index"):
            packed.read(np.arange(len(starts) - 1))


def test_a_failing_block_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BLOCK_DOCUMENTS", 2)
    sizes = np.ones(40, dtype=np.int32)
    real = DocumentOrder.range

    def failing(self: DocumentOrder, start: int, stop: int) -> np.ndarray:
        if start == 6:
            raise MemoryError("no memory")
        return real(self, start, stop)

    monkeypatch.setattr(DocumentOrder, "range", failing)
    with pytest.raises(MemoryError, match="no memory"):
        sample_starts(sizes, DocumentOrder(40, 1), (0, 40), 4)
