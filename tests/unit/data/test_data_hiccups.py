"""A disk that does not answer for a moment changes nothing, and one that never does is no reason to give up
for good."""

from __future__ import annotations

import base64
import contextlib
import errno
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from support.token_datasets import random_documents, write_dataset

from megatron_lpa import files
from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.identity import identity_of, same_files
from megatron_lpa.data.index_cache import IndexCache, SampleIndex
from megatron_lpa.data.splits import open_splits
from megatron_lpa.data.storage.checksums import block_digests
from megatron_lpa.data.storage.dataset_manifest import read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.storage.partial_file import explained_write_errors
from megatron_lpa.data.tokenizers.opening import load_tokenizer, save_tokenizer
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.inspection.statistics import summarize
from megatron_lpa.inspection.verification import verify
from megatron_lpa.preparation.merge import merge
from megatron_lpa.preparation.readers import SourceReader
from megatron_lpa.preparation.sources import file_sources

DOCUMENTS = random_documents(0, 60)
TOKENS = [token for document in DOCUMENTS for token in document]
STARTS = np.arange(40, dtype=np.uint32).reshape(20, 2)
MAY_PASS = [errno.ESTALE, errno.EIO, errno.EMFILE, errno.ETIMEDOUT, errno.ENOMEM]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))


@contextlib.contextmanager
def hiccup(path: Path, operation: str, number: int, times: int) -> Iterator[list[int]]:
    """The next ``times`` system calls of a kind on ``path`` fail; gives how often they did."""
    failed: list[int] = []
    real: Any = {"open": os.open, "stat": os.stat, "pread": os.pread, "mmap": mmap.mmap}[operation]
    inode = path.stat().st_ino

    def is_it(target: Any) -> bool:
        if isinstance(target, int):
            return os.fstat(target).st_ino == inode
        return str(target) == str(path)

    def called(target: Any, *more: Any, **options: Any) -> Any:
        if len(failed) < times and is_it(target):
            failed.append(number)
            raise OSError(number, os.strerror(number), str(path))
        return real(target, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmap if operation == "mmap" else os, operation, called)
        yield failed


@pytest.fixture
def place(tmp_path: Path, bpe_folder: Path, sentencepiece_model: Path) -> Path:
    """A folder with one of every kind of file."""
    write_dataset(tmp_path / "data", DOCUMENTS)
    shutil.copytree(bpe_folder, tmp_path / "bpe")
    shutil.copy(sentencepiece_model, tmp_path / "sp.model")
    ranks = "".join(f"{encoded} {rank}\n" for rank, encoded in enumerate(all_bytes()))
    (tmp_path / "gpt2.tiktoken").write_text(ranks)
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    index_of(tmp_path)
    return tmp_path


def all_bytes() -> list[str]:
    return [base64.b64encode(bytes([value])).decode() for value in range(256)]


def index_of(place: Path, made: list[int] | None = None) -> Any:
    def make() -> SampleIndex:
        (made if made is not None else []).append(1)
        return SampleIndex(STARTS, 77)

    return IndexCache([place / "cache"], 5.0, lambda sentence: None).get("train", "key", make)


def all_tokens(place: Path) -> Any:
    dataset = IndexedDataset(place / "data")
    return dataset.tokens(0, dataset.num_tokens).tolist()


def first_samples(place: Path) -> Any:
    data = DataConfig(prefix=str(place / "data"), cache_dir=str(place / "cache"), split="100,0,0")
    return open_splits(data, 8, 1).train.read(np.arange(20)).tolist()


def documents_by_map(place: Path) -> Any:
    dataset = IndexedDataset(place / "data")
    return [dataset.document(number).tolist() for number in range(dataset.num_documents)]


def text_read(place: Path) -> Any:
    (source,) = file_sources([str(place / "text.jsonl")])
    reader = SourceReader(source, ("text",))
    return b"".join(chunk.data for chunk in reader), reader.sha256


def merged(place: Path) -> Any:
    merge([str(place / "data")], str(place / "out"), overwrite=True)
    return (place / "out.bin").read_bytes(), (place / "out.idx").read_bytes()


def copied(place: Path) -> Any:
    save_tokenizer(str(place / "bpe"), place / "copy")
    return sorted(path.name for path in (place / "copy").iterdir()), load_tokenizer(
        str(place / "copy")
    ).eod_id


def encoded(name: str) -> Callable[[Path], Any]:
    def encode(place: Path) -> Any:
        tokenizer = load_tokenizer(str(place / name))
        return tokenizer.encode("Hello, world"), tokenizer.eod_id, tokenizer.fingerprint

    return encode


CASES: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "tokens by .idx": ("data.idx", all_tokens, ["open", "stat"]),
    "tokens by .bin": ("data.bin", all_tokens, ["open", "stat", "pread"]),
    "a run's samples by .idx": ("data.idx", first_samples, ["open", "stat", "pread"]),
    "a run's samples by .bin": ("data.bin", first_samples, ["open", "stat", "pread"]),
    "documents": ("data.bin", documents_by_map, ["open"]),
    "the manifest": ("data.json", lambda place: read_manifest(place / "data"), ["open"]),
    "checksums": ("data.bin", lambda place: list(block_digests(place / "data.bin", 100)), ["open", "pread"]),
    "identity by .idx": ("data.idx", lambda place: identity_of(str(place / "data")), ["open", "pread"]),
    "identity by .json": ("data.json", lambda place: identity_of(str(place / "data")), ["open"]),
    "the same file": (
        "data.bin", lambda place: same_files(f"{place}/data", f"{place}/bpe/../data"), ["stat"],
    ),
    "a summary": ("data.bin", lambda place: summarize(str(place / "data")), ["open", "stat"]),
    "a verification by .idx": ("data.idx", lambda place: verify(str(place / "data")), ["open", "stat",
    "pread"]),
    "a verification by .bin": ("data.bin", lambda place: verify(str(place / "data")), ["open", "stat",
    "pread"]),
    "a verification by .json": ("data.json", lambda place: verify(str(place / "data")), ["open"]),
    "a merge by .idx": ("data.idx", merged, ["open", "stat", "pread"]),
    "a merge by .bin": ("data.bin", merged, ["open", "stat", "pread"]),
    "tokenizer.json": ("bpe/tokenizer.json", encoded("bpe"), ["open", "stat"]),
    "tokenizer_config.json": ("bpe/tokenizer_config.json", encoded("bpe"), ["open", "stat"]),
    "the tokenizer's folder": ("bpe", encoded("bpe"), ["stat"]),
    "a SentencePiece model": ("sp.model", encoded("sp.model"), ["open", "stat"]),
    "ranks": ("gpt2.tiktoken", encoded("gpt2.tiktoken"), ["open", "stat"]),
    "a copy of the tokenizer": ("bpe/tokenizer_config.json", copied, ["open", "stat"]),
    "text": ("text.jsonl", text_read, ["open", "stat", "pread"]),
}  # fmt: skip
LISTING = ("a verification by .json",)  # there it is one of the problems that are listed
PAIRS = [(name, operation) for name, (_, _, operations) in CASES.items() for operation in operations]


@pytest.mark.parametrize(("name", "operation"), PAIRS)
def test_an_error_that_passes_changes_nothing_and_one_that_stays_asks_for_another_start(
    place: Path, name: str, operation: str
) -> None:
    file, read, _ = CASES[name]
    expected = read(place)
    for number in MAY_PASS:
        with hiccup(place / file, operation, number, 1) as failed:
            assert read(place) == expected
        assert failed == [number]
    with (
        hiccup(place / file, operation, errno.ESTALE, 10_000) as failed,
        pytest.raises(TryAgain, match=os.strerror(errno.ESTALE)) as caught,
    ):
        read(place)
    assert caught.value.exit_code == 1 and len(failed) >= 4
    assert "no such file" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_read_is_what_was_written(place: Path) -> None:
    assert all_tokens(place) == TOKENS
    assert documents_by_map(place) == DOCUMENTS
    assert text_read(place)[0] == (place / "text.jsonl").read_bytes()
    assert copied(place) == (["tokenizer.json", "tokenizer_config.json"], 0)


@pytest.mark.parametrize(
    "name", [name for name, operation in PAIRS if operation == "open" and name not in LISTING]
)
def test_a_permission_that_is_missing_is_said_at_once(place: Path, name: str) -> None:
    file, read, _ = CASES[name]
    with hiccup(place / file, "open", errno.EACCES, 10_000) as failed, pytest.raises(UserError) as caught:
        read(place)
    assert caught.value.exit_code == 78 and len(failed) <= 2
    assert "Permission denied" in str(caught.value) and Path(file).name in str(caught.value)


def test_documents_are_mapped_at_the_second_attempt(place: Path) -> None:
    with hiccup(place / "data.bin", "mmap", errno.ENOMEM, 1) as failed:
        assert documents_by_map(place) == DOCUMENTS
    assert failed == [errno.ENOMEM]


@pytest.mark.parametrize("number", MAY_PASS)
def test_an_index_that_the_disk_does_not_give_is_not_made_again(place: Path, number: int) -> None:
    (path,) = (place / "cache").iterdir()
    made: list[int] = []
    with hiccup(path, "open", number, 1):
        assert index_of(place, made).starts.tolist() == STARTS.tolist()
    with (
        hiccup(path, "open", number, 10_000),
        pytest.raises(TryAgain, match=r"\.index: .*can be removed too"),
    ):
        index_of(place, made)
    assert made == [] and index_of(place, made).num_tokens == 77


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, TryAgain), (errno.EDQUOT, TryAgain), (errno.EIO, TryAgain), (errno.ESTALE, TryAgain),
        (errno.EACCES, UserError), (errno.EROFS, UserError), (errno.ENOTDIR, UserError),
    ],
)  # fmt: skip
def test_an_index_that_cannot_be_written_falls_by_what_the_disk_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[UserError]
) -> None:
    real_mkdir, real_open = Path.mkdir, os.open

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(UserError, match="no folder for the sample index") as caught:
            index_of(tmp_path)
        # Where there is no room for a folder, it is not known whether another attempt finds some.
        assert type(caught.value) is kind
    real_mkdir(tmp_path / "cache")

    def no_lock(path: Any, *more: Any, **options: Any) -> Any:
        return refuse() if str(path).endswith(".lock") else real_open(path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_lock)
        with pytest.raises(UserError, match=r"\.lock: (cannot write|no room)") as caught:
            index_of(tmp_path)
        assert type(caught.value) is kind
    with pytest.raises(UserError) as caught, explained_write_errors(tmp_path):
        refuse()
    assert type(caught.value) is kind


@pytest.mark.parametrize("reason", ["offline", "no network"])
def test_the_hubs_cache_is_looked_at_patiently(
    place: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """Its client takes an error of the disk for "not in the cache"."""
    folder = place / "hub" / "models--someone--tok"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    shutil.copytree(place / "bpe", folder / "snapshots" / "abc123")

    def blind(name: str, file: str, local_files_only: bool) -> str:
        raise LocalEntryNotFoundError("not in the cache")

    def nobody(url: str, timeout: float) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", reason == "offline")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", blind)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", nobody)
    expected = encoded("bpe")(place)
    for file in (folder / "refs" / "main", folder / "snapshots" / "abc123" / "tokenizer.json"):
        for operation in ("open", "stat"):
            with hiccup(file, operation, errno.ESTALE, 1) as failed:
                tokenizer = load_tokenizer("someone/tok")
            assert (tokenizer.encode("Hello, world"), tokenizer.eod_id, tokenizer.fingerprint) == expected
            assert failed == [errno.ESTALE]
            with hiccup(file, operation, errno.ESTALE, 10_000), pytest.raises(TryAgain):
                load_tokenizer("someone/tok")
    with pytest.raises(UserError, match="'someone/other': no such file") as caught:
        load_tokenizer("someone/other")
    # Without network nobody knows; where it is forbidden to ask, another start would know no more.
    assert caught.value.exit_code == (78 if reason == "offline" else 1)
