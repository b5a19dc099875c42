"""Counting words and bytes, and ending documents, against plain Python."""

from __future__ import annotations

import random

import numpy as np

from megatron_lpa.preparation.encode import _with_eod, count_text


def test_words_and_bytes_are_those_of_str_split() -> None:
    generator = random.Random(5)
    blanks = [chr(point) for point in range(0x110000) if chr(point).isspace()]
    assert len(blanks) > 20
    others = [
        "a",
        "é",
        "日",
        "🙂",
        "\u200b",
        "\x1b",
        "\x07",
        "\u3001",
        "\u2fff",
        "\x08",
        "\x0e",
        "!",
        "\x7f",
        "\xff",
    ]
    for _ in range(2000):
        alphabet = generator.choice([["a", " ", "\n"], blanks[:10] + others[:1], blanks + others, others])
        texts = [
            "".join(generator.choices(alphabet, k=generator.randrange(12)))
            for _ in range(generator.randrange(6))
        ]
        expected = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
        assert count_text(texts) == expected, texts


def test_every_document_gets_its_end() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        documents = [generator.integers(1, 9, size).tolist() for size in generator.integers(1, 5, 7)]
        sizes = np.array([len(document) for document in documents])
        ids, longer = _with_eod(np.array(sum(documents, []), dtype=np.uint16), sizes, 0)  # noqa: RUF017
        assert ids.dtype == np.uint16 and (longer == sizes + 1).all()
        assert [list(part) for part in np.split(ids, np.cumsum(longer)[:-1])] == [[*d, 0] for d in documents]
