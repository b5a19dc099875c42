"""Merged datasets against preprocessing at once and against megatron-core's merge, and what is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from support.token_datasets import TOKENIZER, random_documents, write_dataset

from megatron_lpa.data.storage.checksums import block_digests
from megatron_lpa.data.storage.dataset_manifest import SubsetCount, manifest_path, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.storage.indexed_writer import write_index
from megatron_lpa.data.storage.partial_file import PartialFile
from megatron_lpa.errors import UserError
from megatron_lpa.preparation import merge as merge_module
from megatron_lpa.preparation.merge import merge


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    pytest.importorskip("megatron.core", reason="megatron-core, the peer to compare with, is not installed")
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def shards(folder: Path, count: int = 3, documents: int = 20, **options: object) -> list[Path]:
    return [
        write_dataset(folder / f"s.{i}", random_documents(i, documents + i), **options)  # type: ignore[arg-type]
        for i in range(count)
    ]


def same_files(one: Path, other: Path) -> bool:
    return all(Path(f"{one}{e}").read_bytes() == Path(f"{other}{e}").read_bytes() for e in (".bin", ".idx"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_equals_writing_everything_at_once(tmp_path: Path) -> None:
    inputs = shards(tmp_path, 4)
    everything = [document for i in range(4) for document in random_documents(i, 20 + i)]
    write_dataset(tmp_path / "once", everything)
    manifest = merge([str(path) for path in inputs], str(tmp_path / "new" / "all"))
    assert same_files(tmp_path / "new" / "all", tmp_path / "once")
    assert names(tmp_path / "new") == {"all.bin", "all.idx", "all.json"}
    assert manifest == read_manifest(tmp_path / "new" / "all")


def test_order_is_the_order_given(tmp_path: Path) -> None:
    one, other, _ = shards(tmp_path)
    merge([str(other), str(one)], str(tmp_path / "all"))
    merged = IndexedDataset(tmp_path / "all")
    expected = random_documents(1, 21) + random_documents(0, 20)
    assert [merged.document(i).tolist() for i in range(merged.num_documents)] == expected


def test_the_manifest_sums_and_concatenates(tmp_path: Path) -> None:
    inputs = shards(tmp_path)
    parts = [read_manifest(path) for path in inputs]
    merge([str(path) for path in inputs], str(tmp_path / "all"))
    merged = read_manifest(tmp_path / "all")
    assert merged is not None
    for name in ("documents", "tokens", "empty_documents", "dropped_documents", "rejected_documents",
                 "bytes_text", "words"):  # fmt: skip
        assert getattr(merged, name) == sum(getattr(part, name) for part in parts), name
    assert [source.path for source in merged.sources] == [
        f"s.{i}.{letter}.jsonl" for i in range(3) for letter in "ab"
    ]
    assert set(merged.subsets) == {"Pile-CC", "s.0", "s.1", "s.2"}
    counts = [part.subsets["Pile-CC"] for part in parts if part is not None]
    assert merged.subsets["Pile-CC"] == SubsetCount(
        sum(count.documents for count in counts), sum(count.tokens for count in counts)
    )
    assert merged.subsets["s.2"] == parts[2].subsets["s.2"]  # type: ignore[union-attr]
    assert merged.checksums.bin == list(block_digests(tmp_path / "all.bin"))
    assert merged.checksums.idx == list(block_digests(tmp_path / "all.idx"))
    assert merged.tokenizer == TOKENIZER and merged.append_eod and merged.json_key == "text"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_equals_megatrons_merge_with_several_sequences_and_empty_documents(
    tmp_path: Path, megatron: ModuleType, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "_INDEX_BLOCK", 3)  # many blocks
    monkeypatch.setattr(merge_module, "_COPY_BYTES", 10)
    random = np.random.default_rng(0)
    for part in range(4):
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / f"{part}.bin"), dtype=dtype)
        builder.add_document([], [])
        for _ in range(8):
            lengths = random.integers(0, 5, random.integers(0, 4)).tolist()
            builder.add_document(random.integers(0, 60000, sum(lengths)).tolist(), lengths)
        builder.add_document([7], [1])
        builder.add_document([], [])
        builder.finalize(str(tmp_path / f"{part}.idx"))
    theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for part in range(4):
        theirs.add_index(str(tmp_path / str(part)))
    theirs.finalize(str(tmp_path / "theirs.idx"))
    assert merge([str(tmp_path / "[0-3].idx")], str(tmp_path / "ours")) is None
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    assert not manifest_path(tmp_path / "ours").exists()


def test_a_merge_of_merges_is_the_merge_of_all(tmp_path: Path) -> None:
    inputs = [str(path) for path in shards(tmp_path, 4)]
    merge(inputs[:2], str(tmp_path / "left"))
    merge(inputs[2:], str(tmp_path / "right"))
    both = merge([str(tmp_path / "left"), str(tmp_path / "right")], str(tmp_path / "both"))
    assert both == merge(inputs, str(tmp_path / "all"))
    assert same_files(tmp_path / "both", tmp_path / "all")


def test_index_arithmetic_beyond_32_bits(tmp_path: Path) -> None:
    sizes = np.full(7, 2**31 - 1, dtype=np.int32)
    indices = [np.array([0, 2, 2, 7])]
    file, _ = write_index(tmp_path / "d", np.dtype("<i4"), lambda: [sizes[:3], sizes[3:]], 7, indices, 3)
    raw = file.partial_path.read_bytes()
    file.discard()
    assert np.frombuffer(raw, "<i8", 7, 34 + 28).tolist() == [i * 4 * (2**31 - 1) for i in range(7)]


def test_more_than_two_to_the_31_tokens_and_32_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse files, read as zeros; the output is kept sparse by seeking where the tool would write zeros."""
    zeros = bytes(1 << 22)
    write = PartialFile.write

    def write_or_seek(file: PartialFile, data: bytes | memoryview) -> None:
        if len(data) == len(zeros) and bytes(data) == zeros:  # comparing a view is slow
            file._stream.seek(len(data), os.SEEK_CUR)
        else:
            write(file, data)

    monkeypatch.setattr(PartialFile, "write", write_or_seek)
    halves = [1_100_000_000, 1_090_000_000]
    file, _ = write_index(
        tmp_path / "big", np.dtype("<u2"), lambda: [np.array(halves)], 2, [np.array([0, 1, 2])], 2
    )
    file.publish()
    with (tmp_path / "big.bin").open("wb") as stream:
        stream.write(b"\x01\x00")
        stream.seek(2 * halves[0])
        stream.write(b"\x02\x00")
        stream.truncate(2 * sum(halves))
    write_dataset(tmp_path / "end", [[3, 4], [5]], manifest=False)
    merge([str(tmp_path / "big"), str(tmp_path / "end")], str(tmp_path / "all"))
    merged = IndexedDataset(tmp_path / "all")
    assert (merged.num_documents, merged.num_tokens) == (4, sum(halves) + 3)
    assert merged.num_tokens > 2**31 and 2 * merged.num_tokens > 2**32
    assert merged.document(0)[:2].tolist() == [1, 0] and merged.document(1)[:2].tolist() == [2, 0]
    assert [merged.document(i).tolist() for i in (2, 3)] == [[3, 4], [5]]
    (tmp_path / "all.bin").unlink()
    (tmp_path / "big.bin").unlink()


# Damage


@pytest.mark.parametrize("block_bytes", [64, 100, 1 << 26])
def test_damaged_tokens_are_refused_with_the_place(tmp_path: Path, block_bytes: int) -> None:
    inputs = shards(tmp_path, block_bytes=block_bytes)
    path = Path(f"{inputs[1]}.bin")
    good = path.read_bytes()
    before = names(tmp_path)
    for offset in (0, 63, 64, 333, len(good) - 1):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 4]) + good[offset + 1 :])
        block = offset // block_bytes
        last = min((block + 1) * block_bytes, len(good)) - 1
        with pytest.raises(
            UserError, match=rf"s\.1\.bin: damaged: block {block} \(bytes {block * block_bytes} to {last}\)"
        ):
            merge([str(p) for p in inputs], str(tmp_path / "all"))
        assert names(tmp_path) == before
    assert merge([str(p) for p in inputs], str(tmp_path / "all"), verify=False) is not None


def test_a_damaged_index_is_refused_even_where_it_makes_sense(tmp_path: Path) -> None:
    inputs = shards(tmp_path, documents=30, block_bytes=32)
    path = Path(f"{inputs[2]}.idx")
    raw = bytearray(path.read_bytes())
    start = len(raw) - 8 * 20  # some document index, moved to the one after it: still in order
    raw[start : start + 8] = raw[start + 8 : start + 16]
    path.write_bytes(raw)
    IndexedDataset(inputs[2])
    with pytest.raises(UserError, match=rf"s\.2\.idx: damaged: block {start // 32} "):
        merge([str(p) for p in inputs], str(tmp_path / "all"))
    assert merge([str(p) for p in inputs], str(tmp_path / "all"), verify=False) is not None


def test_an_input_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [str(path) for path in shards(tmp_path, manifest=False)]
    before = names(tmp_path)
    check = merge_module.check_alike

    def cut(*arguments: object) -> None:
        check(*arguments)  # type: ignore[arg-type]
        Path(f"{inputs[0]}.bin").write_bytes(b"ab")

    monkeypatch.setattr(merge_module, "check_alike", cut)
    with pytest.raises(UserError, match=r"s\.0\.bin: 2 bytes instead of \d+; it was changed"):
        merge(inputs, str(tmp_path / "all"))
    assert names(tmp_path) == before


# The output


def test_existing_output_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    inputs = [str(path) for path in shards(tmp_path)]
    for ending in (".bin", ".idx", ".json"):
        path = Path(f"{tmp_path / 'all'}{ending}")
        path.write_bytes(b"mine")
        with pytest.raises(UserError, match=rf"all\{ending}: exists; .* --overwrite"):
            merge(inputs, str(tmp_path / "all"))
        assert path.read_bytes() == b"mine"
        path.unlink()
    merge(inputs[:1], str(tmp_path / "all"))
    merge(inputs, str(tmp_path / "all"), overwrite=True)
    assert IndexedDataset(tmp_path / "all").num_documents == 63


def test_overwriting_without_manifests_removes_the_old_one(tmp_path: Path) -> None:
    merge([str(path) for path in shards(tmp_path)], str(tmp_path / "all"))
    bare = [str(path) for path in shards(tmp_path, 2)]
    for prefix in bare:
        Path(f"{prefix}.json").unlink()
    assert merge(bare, str(tmp_path / "all"), overwrite=True) is None
    assert not manifest_path(tmp_path / "all").exists()


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [str(path) for path in shards(tmp_path)]
    merge(inputs, str(tmp_path / "all"))
    needed = sum((tmp_path / f"all{ending}").stat().st_size for ending in (".bin", ".idx"))
    room = SimpleNamespace(f_bavail=needed - 1, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    with pytest.raises(
        UserError, match=rf"b: needs {needed} bytes, but {tmp_path} has only {needed - 1} free"
    ):
        merge(inputs, str(tmp_path / "new" / "deep" / "b"))
    assert not (tmp_path / "new").exists()
    room.f_bavail = needed
    merge(inputs, str(tmp_path / "b"))
    room.f_bavail = 0
    (tmp_path / "c.bin.partial").write_bytes(bytes(1 << 20))  # its room is ours
    merge(inputs, str(tmp_path / "c"))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [str(path) for path in shards(tmp_path)]
    before = names(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"all\.bin\.partial: no room to write"):
        merge(inputs, str(tmp_path / "all"))
    assert names(tmp_path) == before


def test_an_old_manifest_or_index_never_stands_beside_new_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [str(path) for path in shards(tmp_path)]
    merge(inputs, str(tmp_path / "all"))
    seen: list[set[str]] = []
    publish = PartialFile.publish

    def look(file: PartialFile) -> None:
        seen.append({name for name in names(tmp_path) if name.startswith("all.") and "partial" not in name})
        publish(file)

    monkeypatch.setattr(PartialFile, "publish", look)
    merge(inputs[::-1], str(tmp_path / "all"), overwrite=True)
    assert seen == [{"all.bin"}, {"all.bin"}, {"all.bin", "all.idx"}]  # before .bin, .idx and .json
