"""A reference tokenizer with gigatoken in front: the same ids, many times faster."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from megatron_lpa.data.tokenizers.gigatoken_engine import (
    GigatokenEngine,
    build_from_json,
    build_from_ranks,
    build_from_sentencepiece,
    finder,
    refusal,
)
from megatron_lpa.data.tokenizers.probe import probe_texts
from megatron_lpa.data.tokenizers.reference import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_lpa.data.tokenizers.tiktoken_ranks import GIGATOKEN_SCHEMES, TiktokenTokenizer
from megatron_lpa.data.tokenizers.tokenizer import Tokenizer, first_line, is_panic, shortened
from megatron_lpa.errors import UserError

Engine = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to ids ``(tokens,)`` uint32 and tokens per text ``(len(texts),)`` int64."""

# One character in 2,000 is encoded twice: a reference 40 times slower than gigatoken adds 2 % to encoding.
CHECK_EVERY_CHARACTERS = 4 * 2**20
CHECK_CHARACTERS = 2048


class WrongIdsError(UserError):
    """The fast engine was caught giving other ids than the reference."""


class FastTokenizer:
    """Encodes with ``engine``, and with the reference the texts on which the two are known to differ.

    The ids are the reference's. ``accelerate`` has compared the two before; in the run one text of every 4
    MB, or a piece of it, is compared too. Which texts depends on the texts only.

    Args:
        reference: the plain tokenizer.
        engine: the faster one.
        for_reference: tells texts that the engine must not be given.
        check_every_characters: characters encoded between two comparisons in the run.
    """

    def __init__(
        self,
        reference: Tokenizer,
        engine: Engine,
        for_reference: Callable[[str], bool],
        check_every_characters: int = CHECK_EVERY_CHARACTERS,
    ) -> None:
        self.name = reference.name
        self.vocab_size = reference.vocab_size
        self.eod_id = reference.eod_id
        self.fingerprint = reference.fingerprint
        self.engine = "gigatoken"
        self.fallback_reason: str | None = None
        self.reference = reference
        self.for_reference = for_reference
        self._encode = engine
        self._check_every = check_every_characters
        self._unchecked = check_every_characters  # the first text is checked
        self.checks = 0

    def encode(self, text: str) -> list[int]:
        return self.encode_batch_arrays([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids, sizes = self.encode_batch_arrays(texts)
        ends = np.cumsum(sizes).tolist()
        return [ids[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]

    def encode_batch_arrays(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Tokenizer``: uint32 ``(tokens,)`` and int64 ``(len(texts),)``.

        Raises:
            UserError: the comparison in the run found other ids than the reference's.
        """
        routed = np.fromiter(map(self.for_reference, texts), dtype=bool, count=len(texts))
        if not routed.any():
            ids, sizes = self._encode_checked(texts)
            return ids, sizes
        groups: tuple[list[str], list[str]] = ([], [])
        for text, aside in zip(texts, routed.tolist(), strict=True):
            groups[aside].append(text)
        fast_ids, fast_sizes = self._encode_checked(groups[0])
        slow_ids, slow_sizes = self.reference.encode_batch_arrays(groups[1])
        sizes = np.empty(len(texts), dtype=np.int64)
        sizes[~routed], sizes[routed] = fast_sizes, slow_sizes
        from_reference = np.repeat(routed, sizes)
        ids = np.empty(len(from_reference), dtype=np.uint32)
        ids[~from_reference], ids[from_reference] = fast_ids, slow_ids
        return ids, sizes

    def decode(self, ids: list[int]) -> str:
        return self.reference.decode(ids)

    def _encode_checked(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, sizes = self._encode(texts)
        self._unchecked += sum(map(len, texts))
        if self._unchecked >= self._check_every and any(texts):
            self._unchecked = 0
            self._check(texts, ids, sizes)
        return ids, sizes

    def _check(self, texts: list[str], ids: np.ndarray, sizes: np.ndarray) -> None:
        index = self.checks * 97 % len(texts)
        while not texts[index]:
            index = (index + 1) % len(texts)
        text = texts[index]
        if len(text) <= CHECK_CHARACTERS:
            start = int(sizes[:index].sum())
            found = ids[start : start + int(sizes[index])]
        else:
            start = self.checks * 7919 % (len(text) - CHECK_CHARACTERS + 1)
            text = text[start : start + CHECK_CHARACTERS]
            found = self._encode([text])[0]
        self.checks += 1
        if found.tolist() != self.reference.encode(text):
            raise WrongIdsError(
                f"tokenizer {self.name!r}: gigatoken gives other ids than {self.reference.engine} for the "
                f"text {shortened(text, 200)}; what was written so far may be wrong too and is discarded; "
                "start again with --engine reference"
            )


def accelerate(reference: Tokenizer, probed: bool = False) -> Tokenizer:
    """``reference`` behind gigatoken where that gives the same ids, else ``reference`` with a
    ``fallback_reason``.

    ``probed`` takes the equality for known, see :func:`load_tokenizer`.
    """
    try:
        fast = _fast(reference, probed)
    except ImportError as error:
        fast = f"gigatoken is not installed ({error})"
    except BaseException as error:  # the binding raises RuntimeError, ValueError, panics and others
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        fast = f"gigatoken cannot read it ({first_line(error)})"
    if isinstance(fast, str):
        reference.fallback_reason = f"{fast}; {reference.engine} encodes instead"
        return reference
    return fast


def _fast(reference: Tokenizer, probed: bool) -> FastTokenizer | str:
    """The tokenizer behind gigatoken, or why not. Raises what gigatoken raises."""
    if isinstance(reference, HuggingFaceTokenizer):
        data = reference.data
        config = json.loads(data)
        reason = refusal(config)
        if reason is not None:
            return reason
        special = [token["content"] for token in config.get("added_tokens") or []]
        engine = GigatokenEngine(lambda: build_from_json(data))
        for_reference = finder([], unicode_matters=True)
    elif isinstance(reference, SentencePieceTokenizer):
        model = reference.data
        special = reference.unscored_pieces()
        engine = GigatokenEngine(lambda: build_from_sentencepiece(model))
        for_reference = finder(reference.control_pieces(), unicode_matters=False)
    elif isinstance(reference, TiktokenTokenizer):
        ranks = reference.data
        scheme = GIGATOKEN_SCHEMES.get(reference.pattern)
        if scheme is None:
            return "gigatoken has no scheme for its pat_str"
        special = []
        engine = GigatokenEngine(lambda: build_from_ranks(ranks, scheme))
        for_reference = finder([], unicode_matters=True)
    else:
        return f"gigatoken cannot read a {type(reference).__name__}"
    different = None if probed else first_difference(reference, engine, probe_texts(special, for_reference))
    if different is not None:
        return f"gigatoken gives other ids for the text {shortened(different)}"
    return FastTokenizer(reference, engine, for_reference)


def first_difference(reference: Tokenizer, engine: Engine, texts: list[str]) -> str | None:
    """The first text for which the two have different ids, or ``None``."""
    ids, sizes = engine(texts)
    expected_ids, expected_sizes = reference.encode_batch_arrays(texts)
    if np.array_equal(sizes, expected_sizes) and np.array_equal(ids, expected_ids):
        return None
    start = expected_start = 0
    for text, size, expected_size in zip(texts, sizes.tolist(), expected_sizes.tolist(), strict=True):
        expected = expected_ids[expected_start : expected_start + expected_size]
        if not np.array_equal(ids[start : start + size], expected):
            return text
        start += size
        expected_start += expected_size
    raise AssertionError("arrays differ, but no text does")
