"""gigatoken in the place of a reference library: where it may be, and what it must not be given.

Found by comparing gigatoken 0.10.0 with tokenizers 0.23.3, sentencepiece 0.2.3 and tiktoken 0.14.0 on all
assigned code points, random mixtures of difficult pieces and real text:

- Its Unicode tables are of version 17. The references' patterns are of version 16 (4,657 letters and
  digits differ, and 42 marks where a pattern asks for those), and the NFC of tokenizers is of about version 9
  (it does not reorder newer marks). Texts with such code points go to the reference.
- It takes the control pieces of a SentencePiece model for tokens where a text spells them out. Texts with
  them go to the reference.
- Other ids for common texts: SentencePiece models that normalize (nmt_nfkc and its like, or
  ``remove_extra_whitespaces``) or have user-defined symbols; added tokens of blanks with ``rstrip``, or
  some with ``normalized`` and some without that overlap; a Split that removes. The probe finds these.
- Read but not done: added tokens with ``single_word``, a "ByteLevel" without pattern, dropout,
  ``continuing_subword_prefix``, ``end_of_word_suffix``. ``refusal`` names these.
- Refused by gigatoken itself: unigram, WordPiece, other normalizers than NFC, unknown patterns, BPE without
  all bytes, tiktoken ranks with a hole.
"""

from __future__ import annotations

import functools
import re
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil

from megatron_lpa.errors import shown

# gigatoken remembers every word that it has seen, without bound: 400 MB of random words of 9 letters grew
# the process to 3.2 GB (of 40 letters to 2.2 GB), 65 MB of real text by 0.07 GB; its SentencePiece backend
# stayed at 0.3 GB. A tokenizer loaded anew starts empty: with it 300 MB of random words peaked at 0.43 GB.
CACHE_LIMIT_BYTES = 256 * 2**20
_MEASURE_CHARACTERS = 2**20

# Letters and marks that Unicode 10 to 17 added, generously: what they exclude beyond that is as rare.
_NEW_BMP = (
    "\u07fd\u0870-\u08d3\u09fe\u0c3c\u0c5c-\u0c5d\u0cdc-\u0cdd\u0cf3\u0d00\u0d3b-\u0d3c\u0d81\u0eba\u0ece\u1715"
    "\u180f\u1abf-\u1aff\u1df6-\u1dfb\u20c1\ua7c0-\ua7f6\ua82c\ud800-\udfff"
)
_NEW_ASTRAL = "\U00010500-\U0001cfff\U0001d800-\U0001efff\U0002a6de-\U0010ffff"


class GigatokenEngine:
    """A gigatoken tokenizer whose memory is bounded.

    Args:
        build: makes the gigatoken tokenizer; called again whenever the process has grown by
            ``limit_bytes`` since the last time.
    """

    def __init__(self, build: Callable[[], Any], limit_bytes: int = CACHE_LIMIT_BYTES) -> None:
        self._build = build
        self._limit_bytes = limit_bytes
        self._process = psutil.Process()
        self.builds = 0
        self._tokenizer: Any = None
        self._unmeasured = 0
        self._start_bytes = 0
        self._rebuild()

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids ``(tokens,)`` uint32 and tokens per text ``(len(texts),)`` int64."""
        # Not encode_batch: for SentencePiece that forgets its words after every batch, and it imports
        # awkward.
        encode = self._tokenizer.encode
        parts = [encode(text) for text in texts]
        sizes = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        result = (np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)), sizes
        self._unmeasured += sum(map(len, texts))
        if self._unmeasured >= _MEASURE_CHARACTERS:
            self._unmeasured = 0
            if self._process.memory_info().rss - self._start_bytes > self._limit_bytes:
                self._rebuild()
        return result

    def _rebuild(self) -> None:
        self._tokenizer = None  # first, or both would be in memory
        self._tokenizer = self._build()
        self.builds += 1
        self._unmeasured = 0
        self._start_bytes = self._process.memory_info().rss


def build_from_json(data: bytes) -> Any:
    """Of a ``tokenizer.json``. Raises what gigatoken raises."""
    import gigatoken

    return gigatoken.Tokenizer.from_json(data)


def build_from_sentencepiece(data: bytes) -> Any:
    """Of a ``.model``. Raises what gigatoken raises."""
    import gigatoken

    return gigatoken.Tokenizer.from_sentencepiece(data)


def build_from_ranks(data: bytes, scheme: str) -> Any:
    """Of a ``.tiktoken`` and gigatoken's name for its pattern. Raises what gigatoken raises."""
    import gigatoken

    # It reads files only, and only in the order of ranks. The special tokens stay out: in a text they are
    # ordinary text.
    lines = sorted(filter(None, map(bytes.split, data.splitlines())), key=lambda line: int(line[1]))
    with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
        file.writelines(b"%s %s\n" % (token, rank) for token, rank in lines)
        file.flush()
        return gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer=scheme, special_tokens={})


def refusal(config: Any) -> str | None:
    """What in a parsed ``tokenizer.json`` gigatoken reads but does not do, or ``None``."""
    model = config.get("model") or {}
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"gigatoken does not know {key}={shown(model[key])}"
    for token in config.get("added_tokens") or []:
        if token.get("single_word"):
            return f"gigatoken does not know the added token {shown(token.get('content'))} with single_word"
    splitter = config.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers") or [splitter]
    whole = [step for step in steps if step.get("type") == "ByteLevel" and not step.get("use_regex", True)]
    if whole and not any(step.get("type") == "Split" for step in steps):
        return "gigatoken does not know a byte-level pre_tokenizer without a pattern"
    return None


@functools.cache
def new_in_unicode() -> re.Pattern[str]:
    """Matches a code point on which the Unicode versions of the engines may disagree, or half a surrogate
    pair.

    What this Python takes for unassigned is included, for it may be a letter to a newer gigatoken.
    """
    unassigned = [
        chr(point)
        for point in range(0x10000)
        if unicodedata.category(chr(point)) == "Cn" and not (0xFDD0 <= point < 0xFDF0 or point >= 0xFFFE)
    ]
    return re.compile(f"[{''.join(unassigned)}{_NEW_BMP}{_NEW_ASTRAL}]")


@functools.cache
def _excluded_points() -> np.ndarray:
    """For every code point whether :func:`new_in_unicode` matches it: a table is five times as fast."""
    excluded = np.zeros(0x110000, dtype=bool)
    lowest = "".join(map(chr, range(0x10000)))
    excluded[[match.start() for match in new_in_unicode().finditer(lowest)]] = True
    for first, last in re.findall("(.)-(.)", _NEW_ASTRAL):
        excluded[ord(first) : ord(last) + 1] = True
    return excluded


def finder(spelt_out: Sequence[str], unicode_matters: bool) -> Callable[[str], bool]:
    """Tells the texts that go to the reference: those that hold one of ``spelt_out``, or new code points."""
    search = re.compile("|".join(map(re.escape, spelt_out))).search
    # One character that all begin with, such as "<", is found ten times as fast as whole pieces.
    start = spelt_out[0][0] if len({piece[0] for piece in spelt_out}) == 1 else ""
    spelt = lambda text: bool(spelt_out) and start in text and search(text) is not None  # noqa: E731
    excluded = _excluded_points() if unicode_matters else None

    def found(text: str) -> bool:
        if excluded is not None and not text.isascii():
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
            if excluded[points[points > 127]].any():
                return True
        return spelt(text)

    return found
