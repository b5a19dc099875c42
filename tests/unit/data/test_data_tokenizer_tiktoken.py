"""tiktoken rank files against the tiktoken package and against the BPE that the ranks were made from."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from test_data_tokenizer_texts import GPT2_BYTES, breaking_texts, random_texts

from megatron_lpa.data.tokenizers.fast import FastTokenizer
from megatron_lpa.data.tokenizers.opening import load_tokenizer, save_tokenizer
from megatron_lpa.data.tokenizers.tiktoken_ranks import TiktokenTokenizer
from megatron_lpa.errors import UserError

OLD_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL = {"<|endoftext|>": 700, "<|im_end|>": 701}


@pytest.fixture(scope="module")
def ranks(bpe_folder: Path) -> dict[bytes, int]:
    """The tests' BPE without its special token, id 0; its trainer numbers tokens in the order of merges."""
    vocabulary = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json")).get_vocab()
    return {
        bytes(GPT2_BYTES[letter] for letter in token): number - 1
        for token, number in vocabulary.items()
        if token != "<|endoftext|>"
    }


def write_ranks(file: Path, ranks: dict[bytes, int]) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    file.write_text("".join(lines))
    return file


def test_ids_are_those_of_the_bpe(ranks: dict[bytes, int], bpe_folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(str(write_ranks(tmp_path / "r50k_base.tiktoken", ranks)))
    assert (ours.engine, ours.eod_id, ours.vocab_size) == ("tiktoken", 50256, 50257)
    bpe = load_tokenizer(str(bpe_folder))
    texts = [text for text in [*breaking_texts(), *random_texts(500)] if "<|endoftext|>" not in text]
    expected = [[number - 1 for number in ids] for ids in bpe.encode_batch(texts)]
    assert ours.encode_batch(texts) == expected
    assert [ours.decode(ids) for ids in expected] == texts
    ids, sizes = ours.encode_batch_arrays(texts)
    assert (ids.dtype, sizes.dtype, sizes.tolist()) == ("uint32", "int64", list(map(len, expected)))


@pytest.mark.parametrize(
    "stem", ["gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base", "old", "llama"]
)
def test_the_fast_engine_gives_tiktokens_ids(stem: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    file = write_ranks(tmp_path / f"{stem}.tiktoken", ranks)
    old_gpt4 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    pattern = {"old": OLD_GPT2, "llama": old_gpt4}.get(stem)
    if pattern is not None:
        (tmp_path / f"{stem}.json").write_text(json.dumps({"pat_str": pattern, "special_tokens": SPECIAL}))
    fast = load_tokenizer(str(file), engine="auto")
    reference = fast.reference if isinstance(fast, FastTokenizer) else None
    assert isinstance(reference, TiktokenTokenizer), fast.fallback_reason
    theirs = tiktoken.Encoding(
        "x", pat_str=reference.pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 60000}
    )
    texts = [*breaking_texts(), *random_texts(600), "a<|endoftext|>b", "<|im_end|>", " " * 5000 + "x"]
    assert fast.encode_batch(texts) == [theirs.encode_ordinary(text) for text in texts]
    assert fast.eod_id is not None and fast.eod_id not in fast.encode("a<|endoftext|>b")


@pytest.mark.parametrize("config", ["mine.json", "tokenizer_config.json"])
def test_the_pattern_is_read_and_kept(config: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_ranks(source / "mine.tiktoken", ranks)
    (source / config).write_text(json.dumps({"pat_str": r"\s+|\S+", "special_tokens": SPECIAL}))
    tokenizer = load_tokenizer(str(source))
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (700, 702)
    save_tokenizer(str(source / "mine.tiktoken"), tmp_path / "saved")
    for saved in (tmp_path / "saved", tmp_path / "saved/mine.tiktoken"):
        again = load_tokenizer(str(saved))
        assert (again.fingerprint, again.eod_id) == (tokenizer.fingerprint, 700)
        assert again.encode("Hello, world's") == tokenizer.encode("Hello, world's")
    auto = load_tokenizer(str(source), engine="auto")
    assert auto.engine == "tiktoken" and "no scheme for its pat_str" in str(auto.fallback_reason)
    (source / config).write_text(json.dumps({"pat_str": r"\S+|\s+", "special_tokens": SPECIAL}))
    assert load_tokenizer(str(source)).fingerprint != tokenizer.fingerprint
    (source / "tokenizer_config.json").write_text(
        json.dumps({"pat_str": OLD_GPT2, "special_tokens": SPECIAL, "eos_token": "<|im_end|>"})
    )
    assert load_tokenizer(str(source)).eod_id == 701


def test_ranks_that_gigatoken_cannot_read_stay_with_tiktoken(ranks: dict[bytes, int], tmp_path: Path) -> None:
    """The real p50k_base leaves a rank out for <|endoftext|>."""
    last = max(ranks.values())
    holed = {token: rank + (rank == last) for token, rank in ranks.items()}
    tokenizer = load_tokenizer(str(write_ranks(tmp_path / "p50k_base.tiktoken", holed)), engine="auto")
    assert tokenizer.engine == "tiktoken"
    assert "gigatoken cannot read it" in str(tokenizer.fallback_reason)


def test_what_is_no_rank_file_is_named(ranks: dict[bytes, int], tmp_path: Path) -> None:
    file = write_ranks(tmp_path / "mine.tiktoken", ranks)
    with pytest.raises(UserError, match=r"mine\.tiktoken: a rank file lacks.*in mine\.json: .*pat_str"):
        load_tokenizer(str(file))
    for config, message in (
        ({"pat_str": 3}, r"mine\.json: pat_str is 3"),
        ({"pat_str": "x", "special_tokens": ["a"]}, r"mine\.json: special_tokens is"),
        ({"pat_str": "x", "special_tokens": {"a": 5}}, r"id 5 of special token 'a' is taken"),
        ({"pat_str": "("}, r"mine\.tiktoken: tiktoken cannot use its pat_str"),
    ):
        (tmp_path / "mine.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(file))
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(UserError, match=r"mine\.json, line 1: not valid JSON"):
        load_tokenizer(str(file))
    named = tmp_path / "gpt2.tiktoken"
    for text, message in (
        ("IQ== 0\nIg==\n", r"gpt2\.tiktoken:2: not '<base64> <rank>'"),
        ("I! 0\n", r"gpt2\.tiktoken:1: not"),
        ("IQ== 0\nIg== 0\n", r"two tokens have the same rank"),
        ("IQ== 0\n", r"no rank for byte 0"),
        ("IQ== -1\n", r"gpt2\.tiktoken:1: .*rank -1"),
    ):
        named.write_text(text)
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(named))
    with pytest.raises(UserError, match=r"2 \.tiktoken files in this folder; give one"):
        load_tokenizer(str(tmp_path))


def test_blanks_without_end_are_explained(ranks: dict[bytes, int], tmp_path: Path) -> None:
    """tiktoken's pattern engine has a stack that a million blanks overflow; gigatoken has none."""
    file = write_ranks(tmp_path / "o200k_base.tiktoken", ranks)
    text = " " * 1_000_000 + "a"
    with pytest.raises(
        UserError, match=r"tiktoken cannot encode the text ' .*1000001 characters.*--engine auto"
    ):
        load_tokenizer(str(file)).encode_batch([text])
    fast = load_tokenizer(str(file), engine="auto")
    assert fast.decode(fast.encode(text)) == text
