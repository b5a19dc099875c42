"""Tokenizers against the libraries they come from."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
import tokenizers
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_lpa.data.tokenizer import load_tokenizer
from megatron_lpa.data.train_tokenizer import train_tokenizer
from megatron_lpa.errors import UserError

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


def test_what_is_no_tokenizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text('{"not": "a tokenizer"}')
    (tmp_path / "a.model").write_bytes(b"not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "a.dat").write_bytes(b"")
    for name, message in (
        ("a.json", r"a\.json: not a tokenizer\.json"),
        ("a.model", r"a\.model: not a SentencePiece model"),
        ("empty.model", r"empty\.model: not a SentencePiece model"),
        ("a.dat", r"a\.dat: unknown kind"),
        (".", r"neither tokenizer\.json nor tokenizer\.model"),
        ("missing/folder", r"missing/folder: no such tokenizer file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path / name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'someone/no-such-tokenizer': .* hub did not give"):
        load_tokenizer("someone/no-such-tokenizer")


def test_a_hub_name_reads_the_hubs_files(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(bpe_folder / file))
    ours = load_tokenizer("someone/some-tokenizer")
    assert (ours.name, ours.eod_id) == ("someone/some-tokenizer", 0)
    assert ours.encode("Hello world") == load_tokenizer(str(bpe_folder)).encode("Hello world")


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
