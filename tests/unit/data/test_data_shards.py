"""Joining the shards of a run: once, by whoever completes the last, whatever was killed before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_lpa.data.preparation.preprocess import preprocess
from megatron_lpa.data.preparation.preprocess_config import PreprocessConfig
from megatron_lpa.data.preparation.shards import merge_if_last
from megatron_lpa.data.storage.manifest import read_manifest
from megatron_lpa.errors import UserError


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
        assert f"{2 - number} of 3 shards are still to be done" in str(merge_if_last(shard))
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
