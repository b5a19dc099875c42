"""Tokenizers against the libraries they come from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_lpa.data.tokenizers.opening import load_tokenizer, save_tokenizer
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.bpe import train_tokenizer

SAMPLES = ["", " ", "Hello world", "  two  spaces\n\nand lines", "naïve café 日本 🙂", "x = {'a': 1}\t# code"]


def test_ids_are_those_of_transformers(bpe_folder: Path, prose: list[str]) -> None:
    ours, theirs = load_tokenizer(str(bpe_folder)), PreTrainedTokenizerFast.from_pretrained(bpe_folder)
    texts = [*SAMPLES, *prose[:20]]
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch(texts) == expected
    assert [ours.encode(text) for text in texts] == expected
    assert [ours.decode(ids) for ids in expected] == texts
    assert (ours.vocab_size, ours.eod_id) == (len(theirs), theirs.eos_token_id) == (600, 0)
    assert ours.fingerprint == hashlib.sha256((bpe_folder / "tokenizer.json").read_bytes()).hexdigest()
    assert load_tokenizer(str(bpe_folder / "tokenizer.json")).encode_batch(texts) == expected
    assert AutoTokenizer.from_pretrained(bpe_folder)(texts[4])["input_ids"] == expected[4]


def test_ids_are_those_of_sentencepiece(sentencepiece_model: Path, prose: list[str], tmp_path: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    texts = [*SAMPLES, *prose[:20]]
    expected = [theirs.encode(text) for text in texts]
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model.v1")
    for name in (sentencepiece_model, tmp_path, tmp_path / "tokenizer.model.v1"):
        ours = load_tokenizer(str(name))
        assert ours.encode_batch(texts) == expected
        assert [ours.encode(text) for text in texts] == expected
        assert ours.decode(expected[4]) == texts[4]
        assert (ours.vocab_size, ours.eod_id) == (theirs.vocab_size(), theirs.eos_id())
        assert ours.fingerprint == hashlib.sha256(sentencepiece_model.read_bytes()).hexdigest()


def test_settings_that_would_change_documents_are_put_aside(bpe_folder: Path, tmp_path: Path) -> None:
    """Files saved after fine-tuning may truncate, pad and add special tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    expected = [tokenizer.encode(text).ids for text in ("Hello world " * 50, "short")]
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode_batch(["Hello world " * 50, "short"]) == expected


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_the_end_token_is_the_one_the_config_names(bpe_folder: Path, tmp_path: Path, eos: object) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eod_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.eod_id, loaded.vocab_size) == (600, 601)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token is '<none>'"):
        load_tokenizer(str(tmp_path))


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"not": "a tokenizer"}')
    broken = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1},
        "merges": [["a", "b"]],
        "continuing_subword_prefix": "##",
    }
    (tmp_path / "panic.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": broken}))
    (tmp_path / "a.model").write_bytes(b"not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "a.dat").write_bytes(b"")
    for name, message in (
        ("a.json", r"a\.json: not a tokenizer\.json"),
        ("panic.json", r"panic\.json: not a tokenizer\.json"),
        ("a.model", r"a\.model: not a SentencePiece model"),
        ("empty.model", r"empty\.model: not a SentencePiece model"),
        ("a.dat", r"a\.dat: unknown kind"),
        (".", r"neither tokenizer\.json nor tokenizer\.model nor a \.tiktoken"),
        ("missing/folder", r"missing/folder: no such tokenizer file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path / name))


def test_arrays_hold_what_the_lists_hold(bpe_folder: Path, sentencepiece_model: Path) -> None:
    for name, engine in ((bpe_folder, "tokenizers"), (sentencepiece_model, "sentencepiece")):
        tokenizer = load_tokenizer(str(name))
        assert (tokenizer.engine, tokenizer.fallback_reason) == (engine, None)
        for texts in (SAMPLES, [""], []):
            ids, sizes = tokenizer.encode_batch_arrays(texts)
            assert (ids.dtype, sizes.dtype, ids.ndim) == (np.uint32, np.int64, 1)
            lists = tokenizer.encode_batch(texts)
            assert ids.tolist() == [token for tokens in lists for token in tokens]
            assert sizes.tolist() == [len(tokens) for tokens in lists]


def test_special_tokens_spelt_out_in_a_text(bpe_folder: Path, sentencepiece_model: Path) -> None:
    """As the two libraries have it: one finds them, the other does not."""
    assert load_tokenizer(str(bpe_folder)).encode("<|endoftext|>") == [0]
    spelt = load_tokenizer(str(sentencepiece_model))
    assert len(spelt.encode("</s>")) > 1 and spelt.eod_id not in spelt.encode("</s>")


@pytest.mark.parametrize("kind", ["folder", "tokenizer.json", "x.json", "x.model", "x.model.v1"])
def test_what_is_saved_is_read_back(
    kind: str, bpe_folder: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(bpe_folder, source)
    (source / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    if kind == "x.json":
        (source / "tokenizer.json").rename(source / kind)
    elif kind != "folder" and kind != "tokenizer.json":
        shutil.copy(sentencepiece_model, source / kind)
    name = str(source if kind == "folder" else source / kind)
    save_tokenizer(name, tmp_path / "saved")
    before, after = load_tokenizer(name), load_tokenizer(str(tmp_path / "saved"))
    assert (before.fingerprint, before.eod_id) == (after.fingerprint, after.eod_id)
    assert before.encode(SAMPLES[4]) == after.encode(SAMPLES[4])
    save_tokenizer("someone/some-tokenizer", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_copy_of_another_kind_takes_the_place_of_the_first(
    bpe_folder: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    """``tokenizer.json`` comes before ``tokenizer.model`` where a folder has both."""
    for name in (str(bpe_folder), str(sentencepiece_model), str(bpe_folder)):
        save_tokenizer(name, tmp_path / "saved")
        assert load_tokenizer(str(tmp_path / "saved")).fingerprint == load_tokenizer(name).fingerprint


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_copy_goes_where_no_link_leads(link: Any, bpe_folder: Path, tmp_path: Path) -> None:
    source, saved, outside = tmp_path / "source", tmp_path / "saved", tmp_path / "outside"
    shutil.copytree(bpe_folder, source)
    (source / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    saved.mkdir()
    outside.write_text("of somebody else")
    for name in ("tokenizer.json", "tokenizer_config.json", ".tokenizer.json.partial"):
        link(outside, saved / name)
    save_tokenizer(str(source), saved)
    assert outside.read_text() == "of somebody else"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (saved / name).read_bytes() == (source / name).read_bytes() and not (saved / name).is_symlink()


def test_training_is_deterministic_and_covers_every_text(prose: list[str], tmp_path: Path) -> None:
    for number, text in enumerate(prose[:30]):
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    sizes = [train_tokenizer([str(tmp_path / "*.txt")], 400, str(tmp_path / name)) for name in ("a", "b")]
    assert sizes == [400, 400]
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    unseen = "Ünïcödé 漢字 \x00\x01 🙂"
    assert tokenizer.decode(tokenizer.encode(unseen)) == unseen
    assert tokenizer.encode("<|endoftext|>") == [0]


def test_training_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"--vocab-size is 256; give 257 or more"):
        train_tokenizer([str(tmp_path / "a.txt")], 256, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"exists and is not an empty folder"):
        train_tokenizer([str(tmp_path / "a.txt")], 300, str(tmp_path))
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        (tmp_path / "bad.jsonl").write_text("{")
        train_tokenizer([str(tmp_path / "bad.jsonl")], 300, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "bad.jsonl"]
