"""Texts on which two engines of a tokenizer have to agree before the faster one is used."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

_BLANKS = (
    " ", "  ", "   ", "       ", "\n", "\n\n", "\n\n\n", "\r", "\r\n", "\r\n\r\n", "\t", "\t\t", "\v", "\f", "\x1c",  # noqa: E501
    "\x1f", "\x85", "\xa0", "\u1680", "\u180e", "\u2000", "\u2009", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000",  # noqa: E501
    "\u200b", "\u200d", "\u2060", "\ufeff", " \n", "\n ", "\n\t", "\t ", " \r\n ",
)  # fmt: skip
_WORDS = (
    "a", "A", "the", " the", "The", "Hello", " world", "ing", "hello world", "naïve", "café", "cafe\u0301", "STRASSE",  # noqa: E501
    "straße", "ﬁn", "①②", "½", "Ⅷ", "İ", "ı", "ſ", "\u212a", "\u212b", "A\u030a", "ＡＢＣ", "ｶﾞ", "が", "か\u3099", "한",  # noqa: E501
    "\u1112\u1161\u11ab", "日本語", "漢字かな交じり文", "中文。", "русский", "Ёлка", "ελληνικά", "ΣΊΣΥΦΟΣ", "ς", "مُحَمَّد",  # noqa: E501
    "עִבְרִית", "हिन्दी", "ไทย", "தமிழ்", "မြန်မာ", "Tiếng Việt", "𝔘𝔫𝔦", "\u0e33", "\u0345", "\u0301", "\u0323\u0307", "q\u0307\u0323",  # noqa: E501
    "😀", "👨\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "🇩🇪🇫🇷", "👍🏽", "☃", "\u20e3",
)  # fmt: skip
_CONTRACTIONS = (
    "'s", "'S", "'t", "'T", "'re", "'RE", "'ve", "'Ve", "'m", "'M", "'ll", "'LL", "'lL", "'d", "'D", "'ſ", "’s", "’ll",  # noqa: E501
    "I'm", "DON'T", "we'll've", "''", "'", "' s", "1's", "!'s",
)  # fmt: skip
_SYMBOLS = (
    "0", "1", "12", "123", "1234", "1234567", "3.14", "1,000", "-1", "1e-5", "0x7F", "٣٤", "²", "𝟘𝟙", "!", "!!", "...",  # noqa: E501
    "…", "—", "--", "=>", "{}", "();", "//", "/*", "*/", "#", "_", "__init__", "$", "\\", "\\n", "%", "&", "@", "<", ">",  # noqa: E501
    "<|", "|>", "▁", "▁▁", "▁a", "Ġ", "Ċ", "ĠĠ", '"', "``", "\x00", "\x01", "\x1b[0m", "\x7f", "\xad", "\ufffd", "\ufffe",  # noqa: E501
    "\uffff", "\ufdd0", "\ue000", "\uf8ff", "\U000f0000", "\U0010fffd", "\U0010ffff", "\U000e0041", "\u202e",
)  # fmt: skip
_SPECIAL = (
    "<s>", "</s>", "<unk>", "<pad>", "<mask>", "<0x41>", "<0x0A>", "[CLS]", "[UNK]", "[MASK]", "<|endoftext|>",  # noqa: E501
    "<|padding|>", "<|im_start|>", "<|im_end|>", "<|endoftext|", "<s", "s>",
)  # fmt: skip
_CODE = (
    "def f(x, y=1):\n    return {'a': [x ** 2, y], \"b\": None}  # comment\n",
    "#include <stdio.h>\nint main(void)\n{\n\tprintf(\"%d\\n\", 1);\n\treturn 0;\n}\n\n",
    "<p class='x'>a &amp; b<br/></p>\r\n\r\n<!-- -->\r\n",
    "    indented\n        more\n\t\ttabs   \n\n\n  trailing   ",
    "https://example.org/a_b/c-d?e=f&g=%20#h user@example.org C:\\dir\\file.txt",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n$$\\frac{a}{b} \\neq x_{i}^{2}$$\n",
)  # fmt: skip
_RUNS = (
    " ",
    "\n",
    "a",
    "\u200b",
    "é",
    "日",
    "=",
    "-",
    "\t",
    "\u0301",
    "9",
    "'",
    "😀",
    "\xa0",
    "\r\n",
    " \n",
    "▁",
    "the",
)
# Letters alike by the thousands: every 16th will do.
_UNIFORM = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900))


def probe_texts(special: Sequence[str], excluded: Callable[[str], bool]) -> list[str]:
    """A deterministic set of about 5,000 texts, 0.4 million characters, that break tokenizers.

    Args:
        special: special and added tokens of the tokenizer.
        excluded: texts that the faster engine will not be given; code points that it excludes are left out.
    """
    atoms = (*_BLANKS, *_WORDS, *_CONTRACTIONS, *_SYMBOLS, *_SPECIAL, *special[:64])
    atoms = tuple(atom for atom in atoms if not excluded(atom))  # or hardly a mixture would be left
    texts = ["", *atoms, *(f" {atom}" for atom in atoms), *(f"{atom} " for atom in atoms)]
    texts += (
        [f"x{atom}y" for atom in atoms]
        + [f"{atom}{atom}" for atom in atoms]
        + [f"語{atom}1" for atom in atoms]
    )
    texts += [f"{atom}\n{atom}\r\n {atom}" for atom in atoms]
    texts += [*_CODE, "".join(_CODE), "\ufeff".join(_CODE)]
    for run in _RUNS:
        texts += [run * count for count in (2, 3, 4, 5, 8, 17, 40, 1000)] + [f"x{run * 33}y", f" {run * 7} x"]
    texts += ["abcdefghij" * 300, "Donaudampfschifffahrtsgesellschaft" * 30, "0123456789abcdef" * 200]
    texts += _special_texts(special)
    texts += _unicode_texts(excluded)
    choose = random.Random(0)
    for _ in range(1500):
        texts.append("".join(choose.choices(atoms, k=choose.randint(2, 30))))
    return [text for text in texts if not excluded(text)]


def _special_texts(special: Sequence[str]) -> list[str]:
    """Every added token, some of them where a word goes on, and texts in which two of them overlap."""
    texts = []
    for token in special[:1000]:
        texts += [token, f"{token}f", f"é{token}", f" {token} \n", token.lower(), token.upper(), token[:-1]]
    for left in special[:64]:
        for right in special[:64]:
            for size in range(1, min(len(left), len(right))):
                if left.endswith(right[:size]):
                    texts.append(left + right[size:])
                    break
    return texts


def _unicode_texts(excluded: Callable[[str], bool]) -> Iterator[str]:
    """Code points of every plane, so that letter, digit, mark, blank and other give different ids."""
    points: list[int] = []
    start = 0x80
    for first, last in _UNIFORM:
        points += [*range(start, first), *range(first, last, 16)]
        start = last
    points = [*(point for point in points if not 0xD800 <= point < 0xE000), *range(start, 0x10800)]
    points += [*range(0x10800, 0x1D000, 37), *range(0x1D000, 0x20000, 3), *range(0x20000, 0x40000, 331)]
    points += [*range(0x40000, 0x110000, 4099), *range(0xE0000, 0xE0200, 5)]
    group = []
    for point in points:
        letter = chr(point)
        if not excluded(letter):
            group.append(f"a{letter}'s1{letter} {letter}{letter}")
        if len(group) == 16:
            yield "!".join(group)
            group = []
    yield "!".join(group)
