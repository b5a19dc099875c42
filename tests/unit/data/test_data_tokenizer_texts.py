"""Texts that break tokenizers, for the other tokenizer tests, and tests of the probe against them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_lpa.data.tokenizers.gigatoken_engine import finder
from megatron_lpa.data.tokenizers.probe import probe_texts

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's letters for bytes: the printable ones stand for themselves, the others follow from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
GPT2_BYTES = {chr(value): value for value in _PRINTABLE} | {
    chr(256 + number): value
    for number, value in enumerate(value for value in range(256) if value not in _PRINTABLE)
}

_PIECES = (
    " ", "  ", "    ", "\n", "\n\n", "\r\n", "\r", "\t", "\v", "\f", "\x1c", "\x85", "\xa0", "\u1680",
    "\u2003", "\u2028",
    "\u2029", "\u202f", "\u3000", "\u200b", "\u200d", "\ufeff", "\ufffd", "\x00", "\x01", "\x1b", "\x7f",
    "\xad", "\u202e",
    "a", "the", " the", "The", "HELLO", "naïve", "e\u0301", "ﬁ", "①", "½", "ß", "İ", "ſ", "\u212a",
    "A\u030a", "Ａ", "ｶﾞ",
    "か\u3099", "한", "\u1112\u1161\u11ab", "日本語", "русский", "Σς", "مُحَمَّد", "हिन्दी", "ไทยำ", "𝔘", "𝟘", "😀",  # noqa: E501
    "👨\u200d👩\u200d👧", "🇩🇪", "👍🏽", "🫨", "'s", "'S", "'ll", "'Ll", "'ve", "'ſ", "’s", "''", "I'm", "0", "12",  # noqa: E501
    "1234", "٣", "²",
    "3.14", "1e-5", "!", "...", "—", "=>", "{}", "//", "#", "_", "\\n", "<", ">", "▁", "▁▁", "Ġ", "<s>",
    "</s>", "<unk>",
    "<0x41>", "<|endoftext|>", "<|endoftext", "[UNK]", "\u0301", "\u0323\u0307", "\u0345", "\u0897",
    "\u1adc", "\U000323b0",
    "\U0001e6c0", "\ue000", "\U000f0000", "\U0010ffff", "\ufdd0", "\uffff", "\u0378",
    "def f(x):\n    return", "\n\t", "C:\\x",
)  # fmt: skip


def breaking_texts() -> list[str]:
    """Hand-picked texts, about 1,500."""
    texts = ["", "Hello world", "  two  spaces\n\nand lines", "x = {'a': 1}\t# code\r\n"]
    for piece in _PIECES:
        texts += [
            piece,
            f" {piece}",
            f"{piece} ",
            f"a{piece}b",
            f"{piece}{piece}",
            f"1{piece}'s",
            f"{piece}\n",
        ]
        texts += [piece * count for count in (5, 33, 200)]
    return texts


def random_texts(count: int, extra: Sequence[str] = (), seed: int = 0) -> list[str]:
    """``count`` mixtures of difficult pieces and letters from all of Unicode."""
    choose = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = choose.choices((*_PIECES, *extra, *extra), k=int(2 ** choose.uniform(0, 6)))
        for _ in range(choose.randint(0, 3)):
            top = choose.choice((0x7F, 0x7FF, 0xD7FF, 0xD7FF, 0x1FFFF, 0x10FFFF))
            letter = choose.randint(0, top)
            parts.insert(choose.randint(0, len(parts)), chr(letter) if not 0xD800 <= letter < 0xE000 else "?")
        texts.append("".join(parts))
    return texts


def test_the_probe_reaches_every_plane_and_is_small() -> None:
    texts = probe_texts(["<|endoftext|>"], lambda text: False)
    assert texts == probe_texts(["<|endoftext|>"], lambda text: False)
    assert 3000 < len(texts) < 20_000
    assert sum(map(len, texts)) < 1_000_000
    assert {ord(letter) >> 16 for text in texts for letter in text} == set(range(17))


def test_the_probe_leaves_out_what_the_engine_is_not_given() -> None:
    for excluded in (finder([], unicode_matters=True), finder(["<s>", "</s>"], unicode_matters=False)):
        texts = probe_texts(["<s>"], excluded)
        assert not any(map(excluded, texts))
        assert len(texts) > 3000


def test_overlapping_added_tokens_are_probed() -> None:
    texts = probe_texts(["abc", "bcd", "  "], lambda text: False)
    assert {"abc", "abcd", "  ", "abcf", "éabc"} <= set(texts)


def test_many_pieces_are_found_as_few_are() -> None:
    pieces = [f"<ctl{number}>" for number in range(20)]
    for some in (pieces, pieces[:5]):
        found = finder(some, unicode_matters=False)
        assert found(f"x{some[-1]}y") and not found("<ctl") and not found("\U000323b0")
    found = finder(["<s>"], unicode_matters=True)
    assert found("a<s>") and found("\U000323b0") and found("é\u1adc") and found("\u0378")
    assert not any(map(found, ["", "plain", "café 日本 🙂 русский \ue000", "\uffff"]))
