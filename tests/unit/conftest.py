"""Small tokenizers and text, made on the spot."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from support.preprocessing import write_jsonl

from megatron_lpa.preparation.bpe import train_tokenizer


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Python's own reference manual: English with code in it, from 0.1 to 100 kB a piece."""
    return [text for _, text in sorted(topics.items())]


@pytest.fixture(scope="session")
def bpe_folder(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    write_jsonl(folder / "text.jsonl", ({"text": text} for text in prose))
    train_tokenizer([str(folder / "text.jsonl")], 600, str(folder / "tokenizer"))
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def sentencepiece_model(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(prose[:40]).splitlines()),
        model_prefix=str(prefix),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def corpus(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [*prose, "", "naïve 日本 🙂"] * 2
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", [{"text": text} for text in texts])
