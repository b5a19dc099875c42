"""Files from strangers: not regular, of impossible ids, nested without end, of impossible names."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from support.token_datasets import random_documents, write_dataset

from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.index_cache import IndexCache, SampleIndex
from megatron_lpa.data.splits import open_splits
from megatron_lpa.data.storage.dataset_manifest import read_manifest
from megatron_lpa.data.storage.indexed import HEADER, IndexedDataset
from megatron_lpa.data.tokenizers.gigatoken_engine import refusal
from megatron_lpa.data.tokenizers.opening import load_tokenizer, save_tokenizer
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.sources import file_sources

pytestmark = pytest.mark.timeout(60)  # a pipe that is waited for never answers


@pytest.fixture
def place(tmp_path: Path, bpe_folder: Path, sentencepiece_model: Path) -> Path:
    write_dataset(tmp_path / "data", random_documents(0, 20))
    (tmp_path / "bpe").mkdir()
    for path in (*bpe_folder.iterdir(), sentencepiece_model):
        (tmp_path / "bpe" / path.name).write_bytes(path.read_bytes())
    write_ranks(tmp_path / "gpt2.tiktoken", {})
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n')
    return tmp_path


def write_ranks(path: Path, more: dict[bytes, object]) -> str:
    ranks: dict[bytes, object] = {bytes([value]): value for value in range(256)} | more
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return str(path)


READERS: dict[str, Callable[[Path], Any]] = {
    "data.idx": lambda place: IndexedDataset(place / "data"),
    "data.bin": lambda place: IndexedDataset(place / "data"),
    "data.json": lambda place: read_manifest(place / "data"),
    "bpe/tokenizer.json": lambda place: load_tokenizer(str(place / "bpe")),
    "bpe/tokenizer_config.json": lambda place: load_tokenizer(str(place / "bpe")),
    "bpe/tokenizer.model": lambda place: load_tokenizer(str(place / "bpe" / "tokenizer.model")),
    "gpt2.tiktoken": lambda place: load_tokenizer(str(place / "gpt2.tiktoken")),
    "text.jsonl": lambda place: file_sources([str(place / "text.jsonl")]),
}


def replace_with(path: Path, what: str) -> None:
    path.unlink()
    if what == "a named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("what", ["a named pipe", "a device"])
@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_read(place: Path, name: str, what: str) -> None:
    READERS[name](place)
    replace_with(place / name, what)
    with pytest.raises(UserError, match=f"{name}: {what}, not a regular file") as caught:
        READERS[name](place)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("what", ["a named pipe", "a device"])
def test_an_index_is_made_again_in_the_place_of_anything_else(tmp_path: Path, what: str) -> None:
    index = SampleIndex(np.arange(8, dtype=np.uint32).reshape(4, 2), 9)
    cache = IndexCache([tmp_path], 5.0, lambda sentence: None)
    cache.get("train", "key", lambda: index)
    (path,) = tmp_path.iterdir()
    replace_with(path, what)
    assert cache.get("train", "key", lambda: index).num_tokens == 9
    assert path.is_file() and not path.is_symlink()


@pytest.mark.parametrize("name", ["data.json", "bpe/tokenizer.json", "bpe/tokenizer.model", "gpt2.tiktoken"])
def test_nothing_longer_than_its_kind_is_read(place: Path, name: str) -> None:
    os.truncate(place / name, 1 << 40)  # sparse
    with pytest.raises(UserError, match=r"1,099,511,627,776 bytes, more than the 1,073,741,824"):
        READERS[name](place)


def test_a_header_has_to_fit_before_anything_is_mapped(place: Path) -> None:
    path = place / "data.idx"
    content = bytearray(path.read_bytes())
    content[: HEADER.size] = HEADER.pack(b"MMIDIDX\0\0", 1, 8, 1 << 62, 1 << 61)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.idx: cut short"):
        IndexedDataset(place / "data")


def vocabulary_file(path: Path, kind: str, vocabulary: object, added: object = ()) -> str:
    model: dict[str, object] = {"type": kind, "vocab": vocabulary, "unk_token": "a"}
    if kind == "BPE":
        model["merges"] = []
    if kind == "WordPiece":
        model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    tokens = [
        {
            "id": token_id, "content": f"<{number}>", "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for number, token_id in enumerate(added)  # type: ignore[arg-type,var-annotated]
    ]  # fmt: skip
    path.write_text(json.dumps({"version": "1.0", "added_tokens": tokens, "model": model}))
    return str(path)


NO_IDS = [2**31, 2**32 - 1, 2**62, 10**40, 2**22, -1, 1.5, True, None, "1", [1]]


@pytest.mark.parametrize("token_id", NO_IDS, ids=str)
@pytest.mark.parametrize("kind", ["BPE", "WordLevel", "WordPiece"])
def test_ids_that_cannot_be_are_refused_before_the_library_sees_them(
    tmp_path: Path, kind: str, token_id: object
) -> None:
    name = vocabulary_file(tmp_path / "tokenizer.json", kind, {"a": 0, "b": token_id})
    with pytest.raises(UserError, match=r"tokenizer\.json: model\.vocab has the id ") as caught:
        load_tokenizer(name)
    assert caught.value.exit_code == 78 and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    name = vocabulary_file(tmp_path / "tokenizer.json", kind, {"a": 0, "b": 1}, [2, token_id])
    with pytest.raises(UserError, match=r"tokenizer\.json: added_tokens has the id "):
        load_tokenizer(name)


def test_one_id_of_two_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: model\.vocab has the id 7 twice"):
        load_tokenizer(vocabulary_file(tmp_path / "tokenizer.json", "BPE", {"a": 0, "b": 7, "c": 7}))


@pytest.mark.parametrize("kind", ["BPE", "WordLevel", "WordPiece"])
@pytest.mark.parametrize("ids", [[0, 1], [0, 50_000], [5, 900_000], [3, 1_000_000, 2]], ids=str)
def test_gaps_are_no_reason_to_refuse(tmp_path: Path, kind: str, ids: list[int]) -> None:
    vocabulary = dict(zip("abc", ids, strict=False))
    name = vocabulary_file(tmp_path / "tokenizer.json", kind, vocabulary, [ids[0], max(ids) + 1])
    assert (
        load_tokenizer(name).encode("b") == tokenizers.Tokenizer.from_file(name).encode("b").ids == [ids[1]]
    )


@pytest.mark.parametrize("rank", [2**31, 2**62, 2**22, -1, 1.5], ids=str)
def test_ranks_that_cannot_be_are_refused(tmp_path: Path, rank: object) -> None:
    with pytest.raises(UserError, match=r"gpt2\.tiktoken") as caught:
        load_tokenizer(write_ranks(tmp_path / "gpt2.tiktoken", {b"ab": rank}))
    assert str(rank) in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "own.json").write_text(json.dumps({"pat_str": ".", "special_tokens": {"<x>": rank}}))
    with pytest.raises(UserError, match=r"own\.(json|tiktoken)"):
        load_tokenizer(write_ranks(tmp_path / "own.tiktoken", {}))


LONG = "x\n" * 50_000
TAKEN = {LONG: 7}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("own.json", {"pat_str": "."} | {"special_tokens": TAKEN}),
        ("own.json", {"pat_str": "."} | {"special_tokens": {LONG: None}}),
        ("own.json", {"pat_str": "."} | {"special_tokens": [LONG]}),
        ("own.json", {"pat_str": [LONG]}),
        ("own.json", {"pat_str": {LONG: LONG}}),
        ("own.json", {"pat_str": "(" + LONG}),
        ("tokenizer_config.json", {"pat_str": ".", "eos_token": LONG}),
        ("tokenizer_config.json", {"pat_str": ".", "eos_token": {"content": LONG}}),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_what_is_long_is_shown_by_its_beginning(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError) as told:
        load_tokenizer(write_ranks(tmp_path / "own.tiktoken", {}))
    line = str(told.value)
    assert "\n" not in line and str(tmp_path) in line and len(line) < 450 + 2 * len(str(tmp_path))


@pytest.mark.parametrize("rank", ["9" * 4000, "y" * 100_000])
def test_a_rank_that_is_long_is_shown_by_its_beginning(tmp_path: Path, rank: str) -> None:
    with pytest.raises(UserError, match=r"gpt2\.tiktoken") as told:
        load_tokenizer(write_ranks(tmp_path / "gpt2.tiktoken", {b"ab": rank}))
    assert "\n" not in str(told.value) and len(str(told.value)) < 450 + len(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"continuing_subword_prefix": LONG}},
        {"model": {"end_of_word_suffix": [LONG]}},
        {"added_tokens": [{"content": LONG, "single_word": True}]},
    ],
    ids=lambda config: repr(config)[:40],
)
def test_why_gigatoken_is_not_used_is_one_short_line(config: dict[str, Any]) -> None:
    """It goes into records and onto the screen as the reason for the slower engine."""
    reason = refusal(config)
    assert reason is not None and "\n" not in reason and len(reason) < 200


def test_ranks_and_special_tokens_may_leave_gaps(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"pat_str": ".+", "special_tokens": {"<x>": 900_000}}))
    tokenizer = load_tokenizer(write_ranks(tmp_path / "own.tiktoken", {b"ab": 70_000}))
    assert (tokenizer.encode("abc"), tokenizer.vocab_size) == ([70_000, ord("c")], 900_001)


NESTED = {
    "lists": "[" * 100_000,
    "objects": '{"model":' * 100_000,
    "a vocabulary": '{"model": {"type": "BPE", "merges": [], "vocab": {"a": ' + "[" * 100_000,
    "closed": '{"added_tokens": [], "model": {"type": "BPE", "merges": [], "vocab": {}}, "normalizer": '
    + "[" * 100_000 + "]" * 100_000 + "}",
    "normalizers": '{"model": {"type": "BPE", "merges": [], "vocab": {}}, "normalizer": '
    + '{"type": "Sequence", "normalizers": [' * 300 + "]}" * 300 + "}",
}  # fmt: skip


# 300 levels are no error of a file that is only looked into.
LOOKED_INTO = [("tokenizer_config.json", kind) for kind in NESTED if kind != "normalizers"]


@pytest.mark.parametrize(("name", "kind"), [*(("tokenizer.json", kind) for kind in NESTED), *LOOKED_INTO])
def test_nesting_without_end_is_one_line(tmp_path: Path, bpe_folder: Path, name: str, kind: str) -> None:
    """In a process of its own, which a library could end."""
    for path in bpe_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(NESTED[kind])
    code = (
        "import sys\nfrom megatron_lpa.data.tokenizers.opening import load_tokenizer\n"
        "from megatron_lpa.errors import UserError\n"
        "try: load_tokenizer(sys.argv[1])\nexcept UserError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-500:]
    assert name in done.stdout and done.stdout.count("\n") == 1 and len(done.stdout) < 600


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "~nobody-is-called-so/tokenizer"], ids=ascii)
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for read in (
        lambda: load_tokenizer(name),
        lambda: save_tokenizer(name, tmp_path / "copy"),
        lambda: IndexedDataset(name),
    ):
        if "~" in name and read.__code__.co_names[0] == "IndexedDataset":
            continue
        with pytest.raises(UserError, match=r"no such|no file can be called so") as caught:
            read()
        assert caught.value.exit_code == 78 and "\n" not in str(caught.value)


def test_a_folder_that_no_index_can_be_kept_in(place: Path) -> None:
    data = DataConfig(prefix=str(place / "data"), cache_dir="a\0b", split="100,0,0")
    with pytest.raises(UserError, match=r"no folder for the sample index: 'a\\x00b'"):
        open_splits(data, 8, 1)
