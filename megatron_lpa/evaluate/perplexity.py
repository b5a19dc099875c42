"""Loss of a trained decoder on text: per token, per word, per byte.

Two protocols:

* **windows**, the training loop's: consecutive windows of S tokens, so the first token of each has no
  context but one id; every token is predicted once; the end that does not fill a window is left out.
* **sliding** (``stride``): the window moves ``stride`` tokens at a time and only tokens not yet predicted
  count, so each, past the first window, has at least S - stride ids of context; the end counts too.

The end-of-document token is predicted like any other and its loss counts everywhere, as in training. It
has no words and no bytes, so it raises perplexity per word and bits per byte a little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from megatron_lpa.data.tokenizers.opening import Tokenizer
from megatron_lpa.errors import UserError
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.preparation.documents import read_texts
from megatron_lpa.records import perplexity as perplexity_of

COUNTED_AT_ONCE = 1 << 20
"""Tokens that are read at once to count words and bytes."""


class TokenStream(Protocol):
    """Token ids, documents one after the other, read where they are asked for: an array, or a file's.

    Slices have no step, and give integer ``(stop - start,)`` arrays.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Part:
    """The beginning of a stream: its first ``length`` tokens, or all if it has fewer."""

    whole: TokenStream
    length: int

    def __len__(self) -> int:
        return min(self.length, len(self.whole))

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        return self.whole[start : max(start, stop)]


@dataclass(frozen=True)
class TextLoss:
    """How well a text was predicted.

    Args:
        nll_nats: sum of the losses of all predicted tokens.
        tokens: predicted tokens.
        words: runs of non-blanks among the predicted tokens; None without a tokenizer.
        text_bytes: UTF-8 bytes of the predicted tokens; None without a tokenizer.
    """

    nll_nats: float
    tokens: int
    words: int | None = None
    text_bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll_nats / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, per token: comparable between models with the same tokenizer only."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """``exp(nll / words)``, comparable between tokenizers."""
        return _exp(self.nll_nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        """``nll / ln 2 / bytes``, comparable between tokenizers."""
        return self.nll_nats / math.log(2) / self.text_bytes if self.text_bytes else None


def sum_of(losses: Sequence[TextLoss]) -> TextLoss:
    """Several texts as one."""
    words = [loss.words for loss in losses if loss.words is not None]
    text_bytes = [loss.text_bytes for loss in losses if loss.text_bytes is not None]
    return TextLoss(
        math.fsum(loss.nll_nats for loss in losses),
        sum(loss.tokens for loss in losses),
        sum(words) if len(words) == len(losses) else None,
        sum(text_bytes) if len(text_bytes) == len(losses) else None,
    )


@dataclass(frozen=True)
class _Window:
    """Inputs begin at ``begin``; tokens ``first`` up to but without ``end`` of the stream are scored."""

    begin: int
    first: int
    end: int


def measure(
    decoder: Decoder,
    ids: TokenStream,
    tokenizer: Tokenizer | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: bool = False,
) -> TextLoss:
    """Evaluate a stream of token ids.

    Args:
        decoder: in eval mode.
        ids: integer ``(tokens,)``, documents one after the other; no more of them is held in memory than a
            batch needs.
        tokenizer: recovers the text of the predicted ids, for words and bytes.
        stride: tokens that a sliding window moves, 1 to S; None for the training loop's windows.
        batch_size: windows at once.
        max_tokens: predict at most so many tokens, from the start of the stream.
        progress: show a bar on a terminal.

    Raises:
        UserError: too few tokens, an id that the model does not know, or a stride out of range.
    """
    length = decoder.config.sequence_length
    if stride is not None and not 1 <= stride <= length:
        raise UserError(f"--stride is {stride}; give 1 to the model's sequence length {length}")
    if max_tokens is not None:
        ids = Part(ids, max_tokens + 1)
    count = _count_windows(len(ids), length, stride)
    if not count:
        raise UserError(
            f"{len(ids)} tokens are too few: predicting needs one before the first, and the default protocol "
            f"whole windows of {length}; give more text, or --stride {length} to count incomplete windows"
        )
    device = next(decoder.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    windows = _windows(len(ids), length, stride)
    batch_size = min(batch_size, count)
    end = 0
    with torch.inference_mode():
        for _ in tqdm(range(-(-count // batch_size)), unit="batch", disable=None if progress else True):
            batch = list(islice(windows, batch_size))
            end = batch[-1].end
            tokens, scored = _batch(ids, batch, length, decoder.config.vocab_size)
            chunk = torch.from_numpy(tokens).to(device)
            losses = decoder(chunk[:, :-1], chunk[:, 1:]).double()
            total += losses[torch.from_numpy(scored).to(device)].sum()
    words, text_bytes = (None, None) if tokenizer is None else count_text(Part(ids, end), tokenizer, 1)
    return TextLoss(float(total), end - 1, words, text_bytes)


def _count_windows(num_tokens: int, length: int, stride: int | None) -> int:
    """How many ``_windows`` gives."""
    if stride is None:
        return max(0, num_tokens - 1) // length
    return 0 if num_tokens < 2 else 1 + -(-max(0, num_tokens - length - 1) // stride)


def _windows(num_tokens: int, length: int, stride: int | None) -> Iterator[_Window]:
    if stride is None:
        for begin in range(0, num_tokens - length, length):
            yield _Window(begin, begin + 1, begin + length + 1)
        return
    first, begin = 1, 0
    while first < num_tokens:
        end = min(begin + length + 1, num_tokens)
        yield _Window(begin, first, end)
        first, begin = end, begin + stride


def _batch(
    ids: TokenStream, windows: Sequence[_Window], length: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``(b, length + 1)`` and which labels count ``(b, length)``.

    A short window is filled up on the right, where a causal model cannot look.
    """
    tokens = np.zeros((len(windows), length + 1), dtype=np.int64)
    scored = np.zeros((len(windows), length), dtype=bool)
    for row, window in enumerate(windows):
        tokens[row, : window.end - window.begin] = ids[window.begin : window.end]
        scored[row, window.first - window.begin - 1 : window.end - window.begin - 1] = True
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if wrong.size:
        raise UserError(
            f"token id {wrong[0]} but the model knows ids 0 to {vocab_size - 1}; the data was made with "
            "another tokenizer: preprocess it again with the run's"
        )
    return tokens, scored


def count_text(ids: TokenStream, tokenizer: Tokenizer, first: int = 0) -> tuple[int, int]:
    """``(words, UTF-8 bytes)`` of the text that ids decode to, end-of-document tokens left out.

    Documents are decoded one by one. Where the ids begin or end inside a character, its cut-off part
    counts as the replacement character.

    Args:
        ids: documents one after the other.
        tokenizer: what made them.
        first: the ids before this one do not count.
    """
    words = text_bytes = 0
    for document in _documents(ids, tokenizer.eod_id, first):
        text = tokenizer.decode(document.tolist())
        words += len(text.split())
        text_bytes += len(text.encode())
    return words, text_bytes


def _documents(ids: TokenStream, eod_id: int | None, first: int) -> Iterator[np.ndarray]:
    """What lies between end-of-document tokens, read in blocks; an end that no such token follows too."""
    open_pieces: list[np.ndarray] = []
    for begin in range(first, len(ids), COUNTED_AT_ONCE):
        block = ids[begin : min(begin + COUNTED_AT_ONCE, len(ids))]
        ends = [] if eod_id is None else np.flatnonzero(block == eod_id).tolist()
        start = 0
        for end in ends:
            yield np.concatenate([*open_pieces, block[start:end]])
            open_pieces, start = [], end + 1
        open_pieces.append(block[start:])
    if open_pieces:
        yield np.concatenate(open_pieces)


def ids_of_texts(
    inputs: Sequence[str], tokenizer: Tokenizer, key: str = "text", enough: int | None = None
) -> np.ndarray:
    """Token ids, int64 ``(tokens,)``, of text files: each document followed by the end-of-document token.

    That is what ``tools/preprocess_data.py --append-eod`` writes; a tokenizer without such a token joins
    documents directly. Empty documents are left out.

    Args:
        inputs: files, folders and patterns.
        tokenizer: the run's.
        key: of the text in JSON lines.
        enough: no further document is read once there are so many tokens; None reads all.

    Raises:
        UserError: files that cannot be read; see ``preparation/documents.py``.
    """
    eod = [] if tokenizer.eod_id is None else [tokenizer.eod_id]
    pieces: list[np.ndarray] = []
    found = 0
    for text in read_texts(inputs, key):
        if ids := tokenizer.encode(text):
            pieces.append(np.array(ids + eod, dtype=np.int64))
            found += len(pieces[-1])
        if enough is not None and found >= enough:
            break
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def _exp(value: float) -> float:
    return perplexity_of(value)
