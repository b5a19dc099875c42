"""The token files against megatron-core, and everything that can be wrong with them."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_lpa.data.storage.indexed import IndexedDataset, best_dtype
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter
from megatron_lpa.data.storage.partial_file import PartialFile
from megatron_lpa.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [65499, 0]]


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    pytest.importorskip("megatron.core", reason="megatron-core, the peer to compare with, is not installed")
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: type = np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    return prefix


def write_raw(
    prefix: Path,
    sizes: list[int],
    pointers: list[int],
    documents: list[int],
    magic: bytes = b"MMIDIDX\x00\x00",
    version: int = 1,
    code: int = 8,
    tail: bytes = b"",
) -> Path:
    """Files put together by hand; the tokens are 0, 1, 2 ..., uint16."""
    head = magic + struct.pack("<QBQQ", version, code, len(sizes), len(documents))
    body = np.array(sizes, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
    body += np.array(documents, "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(head + body + tail)
    Path(f"{prefix}.bin").write_bytes(np.arange(sum(sizes), dtype="<u2").tobytes())
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_are_the_bytes_megatron_writes(tmp_path: Path, megatron: ModuleType, dtype: type) -> None:
    write(tmp_path / "ours", dtype=dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_we_write(tmp_path: Path, megatron: ModuleType, dtype: type) -> None:
    theirs = megatron.IndexedDataset(str(write(tmp_path / "ours", dtype=dtype)))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.index.dtype == dtype
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_we_read_what_megatron_writes_with_sentences_and_empty_documents(
    tmp_path: Path, megatron: ModuleType
) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    builder.add_document([1, 2, 70000, 4, 5], [2, 3])  # two sentences
    builder.add_document([], [])  # what Megatron's tool writes for an empty text
    builder.add_document([6], [1])
    builder.add_document([], [])
    builder.finalize(str(tmp_path / "d.idx"))
    ours = IndexedDataset(tmp_path / "d")
    assert ours.num_documents == 4
    assert [ours.document(i).tolist() for i in range(4)] == [[1, 2, 70000, 4, 5], [], [6], []]
    assert ours.document_token_offsets().tolist() == [0, 5, 5, 6, 6]
    assert ours.num_tokens == 6


def test_reading_by_documents_and_by_tokens(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "d"))
    assert (dataset.dtype, dataset.num_documents, dataset.num_tokens) == (np.dtype("uint16"), 4, 11)
    assert [dataset.document(i).tolist() for i in range(4)] == DOCUMENTS
    assert dataset.document_token_offsets().tolist() == [0, 3, 4, 9, 11]
    assert [dataset.document_offset(i) for i in range(5)] == [0, 3, 4, 9, 11]
    assert dataset.tokens(2, 6).tolist() == [7, 8, 9, 10]
    for call in (lambda: dataset.document(4), lambda: dataset.document(-1), lambda: dataset.tokens(5, 12)):
        with pytest.raises(IndexError):
            call()


def test_views_cannot_change_the_file_and_pickles_hold_no_tokens(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [list(range(1000))] * 100)
    dataset = IndexedDataset(prefix)
    with pytest.raises(ValueError, match="read-only"):
        dataset.document(0)[0] = 1
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert pickle.loads(data).document(99).tolist() == list(range(1000))


def test_dtype_follows_megatrons_rule(megatron: ModuleType) -> None:
    for vocab_size in (257, 32000, 50257, 65499, 65500, 65536, 128256):
        assert best_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


GOOD = {"sizes": [3, 2], "pointers": [0, 6], "documents": [0, 1, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": b"PARQUETXX"}, r"d\.idx: not a Megatron index"),
        ({"version": 2}, r"d\.idx: index version 2"),
        ({"code": 9}, r"d\.idx: unknown dtype code 9"),
        ({"code": 7}, r"d\.idx: holds float32 values, not token ids"),
        ({"tail": b"\x00" * 3}, r"d\.idx: longer than it should be: 85 bytes instead of 82"),
        ({"tail": b"\x00\x01"}, r"d\.idx: a multimodal index"),
        ({"sizes": [3, -2]}, r"d\.idx: sequence 1 has a negative size"),
        ({"pointers": [0, -6]}, r"d\.idx: sequence 1 has a negative pointer \(-6\)"),
        ({"pointers": [0, 8]}, r"d\.idx: sequence 1 has its pointer at byte 8, not at 6"),
        ({"pointers": [4, 0]}, r"d\.idx: sequence 0 has its pointer at byte 4, not at 0"),
        ({"documents": [0, 1, 3]}, r"d\.idx: its document indices end at 3, but there are 2 sequences"),
        ({"documents": [1, 1, 2]}, r"d\.idx: its document indices begin at 1"),
        ({"documents": [0, 2, 1, 2]}, r"d\.idx: its document indices go backwards at document 1"),
        ({"documents": [0]}, r"d\.idx: holds no documents"),
        ({"sizes": [], "pointers": [], "documents": [0]}, r"d\.idx: holds no documents"),
        ({"sizes": [0, 0], "pointers": [0, 0]}, r"d\.bin: holds no tokens"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    prefix = write_raw(tmp_path / "d", **(GOOD | change))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message) as caught:
        IndexedDataset(prefix)
    assert str(tmp_path) in str(caught.value)


def test_the_hand_made_index_is_good_without_the_damage(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_raw(tmp_path / "d", **GOOD))  # type: ignore[arg-type]
    assert [dataset.document(i).tolist() for i in range(2)] == [[0, 1, 2], [3, 4]]


def test_an_index_cut_anywhere_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d")
    whole = Path(f"{prefix}.idx").read_bytes()
    for length in range(len(whole)):
        Path(f"{prefix}.idx").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"d\.idx: (cut short|not a Megatron index)"):
            IndexedDataset(prefix)


@pytest.mark.parametrize("change", [lambda data: data[:-2], lambda data: data + b"\0\0", lambda data: b""])
def test_tokens_of_another_length_than_the_index_says_are_refused(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    prefix = write(tmp_path / "d")
    path = Path(f"{prefix}.bin")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"d\.bin: \d+ bytes, but d\.idx describes 22"):
        IndexedDataset(prefix)


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.idx: no such file; give the prefix"):
        IndexedDataset(tmp_path / "none")
    prefix = write(tmp_path / "d")
    with pytest.raises(UserError, match=r"give the prefix without its ending: .*/d$"):
        IndexedDataset(f"{prefix}.bin")
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(UserError, match=r"d\.bin: no such file"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(("dtype", "token"), [(np.uint16, 65536), (np.uint16, -1), (np.int32, 1 << 31)])
def test_ids_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path, dtype: type, token: int) -> None:
    with pytest.raises(UserError, match=rf"token id {token} does not fit"):
        write(tmp_path / "d", [[1], [2, token]], dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "d", [[1, 2]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document(np.array([3]))
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_appear_only_at_the_end(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document(np.arange(10))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin.partial", "d.sizes.partial"]
        with pytest.raises(UserError, match=r"d\.idx: no such file"):
            IndexedDataset(tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_replacing_a_dataset_never_pairs_the_old_index_with_new_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "d", [[1, 2], [3]])
    publish = PartialFile.publish

    def die_before_the_index(file: PartialFile) -> None:
        if file.path.suffix == ".idx":
            raise KeyboardInterrupt
        publish(file)

    monkeypatch.setattr(PartialFile, "publish", die_before_the_index)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "d", [[4], [5, 6]])  # as many tokens, so the size of the .bin tells nothing
    with pytest.raises(UserError, match=r"d\.idx: no such file"):
        IndexedDataset(tmp_path / "d")


def test_two_writers_of_one_dataset_exclude_each_other(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document(np.array([1, 2, 3]))
        with (
            pytest.raises(UserError, match=r"d\.bin: another process is writing it"),
            IndexedDatasetWriter(tmp_path / "d", np.uint16),
        ):
            pass
    assert IndexedDataset(tmp_path / "d").document(0).tolist() == [1, 2, 3]


def test_the_raw_index_in_pieces(tmp_path: Path, megatron: ModuleType) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.add_document([], [])
    builder.add_document([6], [1])
    builder.finalize(str(tmp_path / "d.idx"))
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.num_sequences == 3
    assert dataset.sequence_sizes(0, 3).tolist() == [2, 3, 1]
    assert dataset.sequence_sizes(1, 2).tolist() == [3] and dataset.sequence_sizes(3, 3).tolist() == []
    assert dataset.document_indices(0, 4).tolist() == [0, 2, 2, 3]
    assert dataset.document_indices(1, 2).tolist() == [2]
    for call in (lambda: dataset.sequence_sizes(0, 4), lambda: dataset.document_indices(-1, 2)):
        with pytest.raises(IndexError):
            call()
