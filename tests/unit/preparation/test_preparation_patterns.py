"""Patterns find what Python's ``glob`` finds, and no folder is passed over because the disk does not give
it."""

from __future__ import annotations

import errno
import glob
import os
from pathlib import Path
from typing import Any

import pytest
from support.token_datasets import random_documents, write_dataset

from megatron_lpa import files
from megatron_lpa.config import presets
from megatron_lpa.config.presets import preset_names
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.preparation.merge_inputs import resolve_prefixes
from megatron_lpa.preparation.patterns import files_matching
from megatron_lpa.preparation.sources import resolve_inputs

NAMES = ["a/x.jsonl", "a/y.txt", "b/x.jsonl", "b/deep/er/x.jsonl", "c[1]/x.jsonl", ".hid/x.jsonl", "b/.hid.jsonl", "x.jsonl"]  # fmt: skip  # noqa: E501
PATTERNS = [
    "*", "*.jsonl", "*/*.jsonl", "**/*.jsonl", "**", "b/**", "a/?.*", "[ab]/x.jsonl", "c[[]1]/*", "no*/x",
    ".*/*", "b/.*",
    "**/er/*", "b/", "*/", "**/", "a/x.jsonl", "../*/*.jsonl", "./*/x.jsonl", "*/deep/../x.jsonl", "ln/*",
    "**/deep/**/*", "x.jsonl/*",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    here = tmp_path / "here"
    for name in NAMES:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text('{"text": "a"}\n')
    (here / "ln").symlink_to("b/deep")
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_finds_what_glob_finds(place: Path, pattern: str) -> None:
    for base in ("", f"{place}/"):
        expected = {path for path in glob.glob(base + pattern, recursive=True) if os.path.isfile(path)}
        assert {os.path.normpath(p) for p in files_matching(base + pattern)} == {
            os.path.normpath(path) for path in expected
        }
    assert len(files_matching(pattern)) == len(set(files_matching(pattern)))


def test_links_in_a_circle_end(place: Path) -> None:
    (place / "b" / "round").symlink_to("..")
    assert "b/x.jsonl" in files_matching("**/*.jsonl")
    assert len(files_matching("**/*.jsonl")) < 100


def listing_fails(monkeypatch: pytest.MonkeyPatch, folder: Path, times: int, number: int) -> list[int]:
    """The next ``times`` listings of a folder fail, whoever asks."""
    real, failed = os.scandir, []

    def scandir(path: Any = ".") -> Any:
        if len(failed) < times and os.path.realpath(path) == os.path.realpath(folder):
            failed.append(number)
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return failed


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("pattern", ["*/*.jsonl", "**/x.jsonl", "b/*.jsonl"])
def test_a_folder_that_the_disk_does_not_give_is_not_taken_for_an_empty_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, number: int
) -> None:
    (place / "ln").unlink()
    whole = resolve_inputs([pattern])
    failed = listing_fails(monkeypatch, place / "b", 1, number)
    assert resolve_inputs([pattern]) == whole and failed == [number]
    listing_fails(monkeypatch, place / "b", 99, number)
    with pytest.raises(TryAgain, match=r"b.*cannot be read"):
        resolve_inputs([pattern])


def test_a_folder_that_may_not_be_read_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing_fails(monkeypatch, place / "b", 99, errno.EACCES)
    with pytest.raises(UserError, match=r"b: cannot be read.*permissions") as raised:
        resolve_inputs(["*/*.jsonl"])
    assert not isinstance(raised.value, TryAgain)


def test_no_dataset_is_missing_from_a_merged_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (place / "m" / name).mkdir(parents=True)
        write_dataset(place / "m" / name / "part", random_documents(ord(name), 20))
    failed = listing_fails(monkeypatch, place / "m" / "b", 1, errno.ESTALE)
    assert resolve_prefixes(["m/*/part*"], "m/out") == [f"m/{name}/part" for name in "abc"] and failed
    listing_fails(monkeypatch, place / "m" / "b", 99, errno.ESTALE)
    with pytest.raises(TryAgain, match="m/b: cannot be read"):
        resolve_prefixes(["m/*/part*"], "m/other")


def test_a_disk_that_does_not_list_a_folder_at_once_changes_no_code_hash(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files.tree_digest(place, files.files_below(place, ["*.jsonl"]))
    failed = listing_fails(monkeypatch, place / "b" / "deep", 1, errno.ESTALE)
    assert files.tree_digest(place, files.files_below(place, ["*.jsonl"])) == whole and failed
    listing_fails(monkeypatch, place / "b" / "deep", 99, errno.ESTALE)
    with pytest.raises(TryAgain):
        files.tree_digest(place, files.files_below(place, ["*.jsonl"]))


def test_presets_are_listed_by_a_disk_that_hiccups(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = preset_names()
    failed = listing_fails(monkeypatch, presets.PRESET_DIR, 1, errno.EIO)
    assert preset_names() == names and failed
