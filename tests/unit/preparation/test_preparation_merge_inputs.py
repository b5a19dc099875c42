"""Which datasets a merge takes, and which it says do not belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.token_datasets import TOKENIZER, random_documents, write_dataset

from megatron_lpa.command_line import natural_key
from megatron_lpa.data.storage.dataset_manifest import Manifest, SourceRecord, manifest_path, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.merge import merge
from megatron_lpa.preparation.merge_inputs import resolve_prefixes


def shards(folder: Path, count: int = 3, documents: int = 20, **options: object) -> list[Path]:
    return [
        write_dataset(folder / f"s.{i}", random_documents(i, documents + i), **options)  # type: ignore[arg-type]
        for i in range(count)
    ]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Which inputs


def test_patterns_take_every_ending_and_sort_naturally(tmp_path: Path) -> None:
    for number in (10, 9, 1, 2):
        write_dataset(tmp_path / f"pile.{number}_text_document", [[1]])
    expected = [str(tmp_path / f"pile.{number}_text_document") for number in (1, 2, 9, 10)]
    for pattern in ("pile.*_text_document.idx", "pile.*_text_document.bin", "pile.*_text_document",
                    "pile.*_text_document.json", "pile.*", "*"):  # fmt: skip
        assert resolve_prefixes([str(tmp_path / pattern)], "out") == expected, pattern
    for ending in ("", ".idx", ".bin", ".json"):
        named = [f"{expected[i]}{ending}" for i in (3, 0)]
        assert resolve_prefixes(named, "out") == [expected[3], expected[0]]
    assert sorted(["a10", "a9", "b", "a", "2", "a01", "a1"], key=natural_key) == [
        "2", "a", "a01", "a1", "a9", "a10", "b"]  # fmt: skip


def test_a_number_of_inputs_can_be_expected(tmp_path: Path) -> None:
    shards(tmp_path)
    with pytest.raises(UserError, match=r"3 of 4 expected datasets found \(.*s\.0 to .*s\.2\)"):
        merge([str(tmp_path / "s.*.idx")], str(tmp_path / "all"), expect=4)
    merge([str(tmp_path / "s.*.idx")], str(tmp_path / "all"), expect=3)


def test_an_unfinished_shard_that_a_pattern_would_pass_over_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "s.3.bin.partial").write_bytes(b"ab")
    with pytest.raises(UserError, match=r"s\.3\.bin\.partial: matches .* but is unfinished"):
        merge([str(tmp_path / "s.*.idx")], str(tmp_path / "all"))
    (tmp_path / "s.3.bin.partial").rename(tmp_path / "s.2.bin.partial")  # beside a whole one: an old leftover
    merge([str(tmp_path / "s.*.idx")], str(tmp_path / "all"))
    (tmp_path / "s.all.bin.partial").write_bytes(b"ab")  # the leftover of this merge
    merge([str(tmp_path / "s.*.idx")], str(tmp_path / "s.all"))


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    one, other, _ = map(str, shards(tmp_path))
    out = str(tmp_path / "all")
    (tmp_path / "link.bin").symlink_to(f"{one}.bin")
    (tmp_path / "link.idx").symlink_to(f"{one}.idx")
    for inputs, output, message in (
        ([f"{tmp_path}/none*"], out, r"none\*: no dataset matches"),
        ([one, f"{tmp_path}/none"], out, r"none\.idx: no such file"),
        ([one, f"{tmp_path}/none.idx"], out, r"none\.idx: no such file"),
        ([one, other, one], out, r"s\.0: is named twice"),
        ([one, f"{one}.bin"], out, r"s\.0: is named twice"),
        ([f"{tmp_path}/s.*", one], out, r"s\.0: is named twice"),
        ([one, f"{tmp_path}/../{tmp_path.name}/s.0"], out, r"s\.0: is the same data as .*s\.0"),
        ([one, f"{tmp_path}/link"], out, r"link: is the same data as .*s\.0"),
        ([one, other], other, r"s\.1: is the output and among the inputs"),
        ([one, other], f"{tmp_path}/link", r"s\.0: is the output and among the inputs"),
        ([one, other], f"{out}.idx", r"all\.idx: give the prefix without its ending: .*all$"),
    ):
        with pytest.raises(UserError, match=message):
            merge(inputs, output, overwrite=True)


# Which belong together


def refused(tmp_path: Path, message: str, change: Callable[[Manifest], Manifest]) -> None:
    write_dataset(tmp_path / "a", [[1, 0]])
    write_dataset(tmp_path / "b", [[2, 0]], change=change)
    before = names(tmp_path)
    with pytest.raises(UserError, match=message):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "all"))
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": replace(TOKENIZER, fingerprint="e" * 64)}, r"b\.json: has a tokenizer of fingerprint e+, but .*a\.json f+"),  # noqa: E501
        ({"tokenizer": replace(TOKENIZER, eod_id=5)}, r"b\.json: has end-of-document id 5, but .*a\.json 0"),
        ({"tokenizer": replace(TOKENIZER, vocab_size=9)}, r"b\.json: has a vocabulary of 9, but .*a\.json 1000"),  # noqa: E501
        ({"append_eod": False}, r"b\.json: has append_eod False, but .*a\.json True"),
        ({"json_key": "summary"}, r"b\.json: has json_key summary, but .*a\.json text"),
        ({"documents": 2}, r"b\.json: says documents 2, but b\.idx 1"),
        ({"tokens": 3}, r"b\.json: says tokens 3, but b\.idx 2"),
        ({"dtype": "int32"}, r"b\.json: says dtype int32, but b\.idx uint16"),
    ],
)  # fmt: skip
def test_datasets_made_differently_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    refused(tmp_path, message, lambda manifest: replace(manifest, **changes))  # type: ignore[arg-type]


def test_another_name_of_the_same_tokenizer_is_no_difference(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[1, 0]])
    renamed = replace(TOKENIZER, name="elsewhere/tok")
    write_dataset(tmp_path / "b", [[2, 0]], change=lambda m: replace(m, tokenizer=renamed))
    merged = merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "all"))
    assert merged is not None and merged.tokenizer == TOKENIZER


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[1]], manifest=False)
    write_dataset(tmp_path / "b", [[1]], np.int32, manifest=False)
    with pytest.raises(UserError, match=r"b: holds int32 ids, but .*a uint16; tokenize both"):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "all"))


def test_a_missing_manifest_among_others_is_refused_unless_allowed(tmp_path: Path) -> None:
    inputs = [str(path) for path in shards(tmp_path)]
    Path(f"{inputs[1]}.json").unlink()
    out = tmp_path / "all"
    with pytest.raises(UserError, match=r"s\.1\.json: no such file, .* \(1 of 3 inputs have none\)"):
        merge(inputs, str(out))
    assert merge(inputs, str(out), allow_missing_manifests=True) is None
    assert IndexedDataset(out).num_documents == 63
    assert not manifest_path(out).exists()


@pytest.mark.parametrize("digests", [[], ["0" * 64] * 2])
def test_checksums_of_another_length_are_refused(tmp_path: Path, digests: list[str]) -> None:
    message = r"b\.bin: damaged: block 0"
    refused(tmp_path, message, lambda m: replace(m, checksums=replace(m.checksums, bin=digests)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_bytes": 0}, "block_bytes is 0"),
        ({"block_bytes": "x"}, "block_bytes is 'x'"),
        ({"bin": None}, r"checksums\.bin is not a list"),
        ({"idx": [1]}, r"checksums\.idx is not a list"),
    ],
)
def test_checksums_that_are_none_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    refused(
        tmp_path,
        rf"b\.json: a damaged manifest \(.*{message}",
        lambda m: replace(m, checksums=replace(m.checksums, **change)),  # type: ignore[arg-type]
    )


def test_two_datasets_of_one_file_are_refused_unless_allowed(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[1, 0], [2, 0]])
    write_dataset(tmp_path / "b", [[1, 0]], change=lambda m: replace(m, sources=first_sources(tmp_path)))
    inputs = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(UserError, match=r"b: was made from .*, and so was .*a: .*--allow-same-sources"):
        merge(inputs, str(tmp_path / "all"))
    merged = merge(inputs, str(tmp_path / "all"), allow_same_sources=True)
    assert merged is not None and merged.documents == 3


def first_sources(folder: Path) -> list[SourceRecord]:
    manifest = read_manifest(folder / "a")
    assert manifest is not None
    return manifest.sources[-1:]
