"""Joining the shards of a run: once, by whoever completes the last, whatever was killed before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_lpa.data.storage.dataset_manifest import read_manifest
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.preprocess import preprocess
from megatron_lpa.preparation.preprocess_config import PreprocessConfig
from megatron_lpa.preparation.shards import merge_if_last


@pytest.fixture
def shards(prose: list[str], bpe_folder: Path, tmp_path: Path) -> list[PreprocessConfig]:
    (tmp_path / "in").mkdir()
    for number in range(3):
        texts = prose[number * 5 : number * 5 + 5]
        (tmp_path / f"in/{number}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = PreprocessConfig(
        f"{tmp_path}/x", str(bpe_folder), (f"{tmp_path}/in",), engine="reference", log_interval=0
    )
    return [dataclasses.replace(config, shard=(number, 3)) for number in range(3)]


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_the_last_shard_merges_and_nothing_is_done_twice(
    shards: list[PreprocessConfig], tmp_path: Path
) -> None:
    for number, shard in enumerate(shards[:2]):
        preprocess(shard)
        assert f"shards still to be done: {2 - number} of 3" in str(merge_if_last(shard))
    preprocess(shards[2])
    merged = merge_if_last(shards[2])
    prefix = f"{tmp_path}/x_text_document"
    assert isinstance(merged, dict) and merged == {prefix: read_manifest(prefix)}
    files = [Path(f"{prefix}.{ending}") for ending in ("bin", "idx", "json")]
    files += list(tmp_path.glob("x.shard-*"))
    before = {path: identity(path) for path in files}
    for shard in shards:  # the whole array again, also when told to overwrite
        for config in (shard, dataclasses.replace(shard, overwrite=True)):
            preprocess(config)
            assert merge_if_last(config) == merged
    assert {path: identity(path) for path in files} == before


def test_a_merge_killed_before_its_manifest_is_done_again_but_nothing_of_others(
    shards: list[PreprocessConfig], tmp_path: Path
) -> None:
    for shard in shards:
        preprocess(shard)
    merged = merge_if_last(shards[0])
    manifest = tmp_path / "x_text_document.json"
    manifest.unlink()
    assert merge_if_last(shards[1]) == merged and manifest.exists()
    manifest.unlink()
    for ending in ("bin", "idx"):  # somebody else's data under the name of the output
        part = tmp_path / f"x.shard-00000-of-00003_text_document.{ending}"
        (tmp_path / f"x_text_document.{ending}").write_bytes(part.read_bytes())
    with pytest.raises(UserError, match="exists"):
        merge_if_last(shards[2])


def test_a_file_that_came_between_two_tasks_is_noticed(
    shards: list[PreprocessConfig], tmp_path: Path, prose: list[str]
) -> None:
    preprocess(shards[0])
    preprocess(shards[1])
    (tmp_path / "in/4.jsonl").write_text(json.dumps({"text": prose[20]}) + "\n")
    preprocess(shards[2])
    with pytest.raises(UserError, match="made from another list of input files"):
        merge_if_last(shards[2])
    overwriting = [dataclasses.replace(shard, overwrite=True) for shard in shards]
    for shard in overwriting:
        preprocess(shard)
    merged = merge_if_last(overwriting[2])
    assert isinstance(merged, dict)
    (manifest,) = merged.values()
    assert [Path(source.path).name for source in manifest.sources] == [
        "0.jsonl",
        "1.jsonl",
        "2.jsonl",
        "4.jsonl",
    ]


def test_a_shard_whose_input_changed_at_equal_size_is_done_again(
    shards: list[PreprocessConfig], tmp_path: Path
) -> None:
    (before,) = preprocess(shards[0]).values()
    path = tmp_path / "in/0.jsonl"
    path.write_bytes(path.read_bytes().replace(b"o", b"a"))
    with pytest.raises(UserError, match="exists"):
        preprocess(shards[0])
    (after,) = preprocess(dataclasses.replace(shards[0], overwrite=True)).values()
    assert after.sources[0].sha256 != before.sources[0].sha256
