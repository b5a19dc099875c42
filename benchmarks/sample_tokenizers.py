"""Small tokenizers of the two common kinds, trained on the text that is measured."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

from benchmarks.sample_text import write_json_lines
from megatron_lpa.preparation.documents import read_texts

VOCAB_SIZE = 8000
_TRAINING_CHARACTERS = 4_000_000


def train_sample_tokenizers(input_path: Path, folder: Path) -> list[Path]:
    """A byte-level BPE (``tokenizer.json``) and a SentencePiece BPE with byte fallback (``.model``).

    Both get at most 8,000 tokens, fewer where the text is short.
    """
    import sentencepiece

    from megatron_lpa.preparation.bpe import train_tokenizer

    texts = list(_head(input_path))
    sample = folder / "tokenizer_sample.jsonl.zst"
    write_json_lines(sample, texts, "sample")
    vocab_size = min(VOCAB_SIZE, 600 + sum(map(len, texts)) // 100)
    train_tokenizer([str(sample)], vocab_size, str(folder / "byte_level_bpe"))

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.split("\n") if line]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    file = folder / "sentencepiece_bpe" / "tokenizer.model"
    file.parent.mkdir()
    file.write_bytes(model.getvalue())
    return [folder / "byte_level_bpe" / "tokenizer.json", file]


def _head(input_path: Path) -> Iterator[str]:
    characters = 0
    for text in itertools.islice(read_texts([str(input_path)]), 100_000):
        yield text[:_TRAINING_CHARACTERS]
        characters += len(text)
        if characters >= _TRAINING_CHARACTERS:
            return
