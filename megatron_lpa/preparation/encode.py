"""From chunks of records to token ids: the work of one preprocessing task, in whatever process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_lpa.data.storage.indexed import best_dtype
from megatron_lpa.data.tokenizers.opening import Tokenizer, load_tokenizer
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.documents import Documents, Rejection, Selection, parse_chunk
from megatron_lpa.preparation.readers import Chunk

# What str.split() takes for a blank; U+3000 is the last.
_BLANK = np.array([chr(point).isspace() for point in range(0x3002)])


@dataclass
class Counts:
    """Totals of one output. Text counts are of the kept documents; words are runs of non-blanks.

    ``subsets`` holds (documents, tokens) by the name of the subset.
    """

    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    bytes_text: int = 0
    words: int = 0
    subsets: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.empty_documents += other.empty_documents
        self.bytes_text += other.bytes_text
        self.words += other.words
        for name, (documents, tokens) in other.subsets.items():
            documents_before, tokens_before = self.subsets.get(name, (0, 0))
            self.subsets[name] = (documents_before + documents, tokens_before + tokens)


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents under one key: all ids ``(tokens,)``, the length of each ``(documents,)``, and counts."""

    tokens: np.ndarray
    sizes: np.ndarray
    counts: Counts


@dataclass(frozen=True)
class EncodedChunk:
    """What became of a chunk.

    Args:
        outputs: the documents under each key.
        dropped: records left out because of their subset, by its name.
        rejected: the bad records, in order.
    """

    outputs: list[EncodedDocuments]
    dropped: dict[str, int]
    rejected: list[Rejection]


class Encoder:
    """Tokenizes chunks.

    Args:
        tokenizer: what makes the ids.
        selection: what is wanted of every record.
        append_eod: end every document with the end-of-document token, which the tokenizer must have.
    """

    def __init__(self, tokenizer: Tokenizer, selection: Selection, append_eod: bool) -> None:
        self._tokenizer = tokenizer
        self._selection = selection
        self._eod_id = tokenizer.eod_id if append_eod else None
        self._dtype = best_dtype(tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        documents = parse_chunk(chunk, self._selection)
        outputs = [self._encode(texts, documents) for texts in documents.texts]
        return EncodedChunk(outputs, documents.dropped, documents.rejected)

    def _encode(self, texts: list[str], documents: Documents) -> EncodedDocuments:
        tokens, sizes = self._tokenizer.encode_batch_arrays(texts)
        subsets = documents.subsets
        empty = int((sizes == 0).sum())
        if empty:
            kept = np.flatnonzero(sizes)
            texts, subsets, sizes = [texts[i] for i in kept], [subsets[i] for i in kept], sizes[kept]
        tokens = tokens.astype(self._dtype, copy=False)
        if self._eod_id is not None and len(sizes):
            tokens, sizes = _with_eod(tokens, sizes, self._eod_id)
        words, bytes_text = count_text(texts)
        counts = Counts(len(sizes), len(tokens), empty, bytes_text, words)
        for name, size in zip(subsets, sizes.tolist(), strict=True):
            if name is not None:
                documents_before, tokens_before = counts.subsets.get(name, (0, 0))
                counts.subsets[name] = (documents_before + 1, tokens_before + size)
        return EncodedDocuments(tokens, sizes, counts)


def _with_eod(tokens: np.ndarray, sizes: np.ndarray, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    sizes = sizes + 1
    ends = np.cumsum(sizes) - 1
    is_text = np.ones(int(ends[-1]) + 1, dtype=bool)
    is_text[ends] = False
    longer = np.empty(len(is_text), dtype=tokens.dtype)
    longer[is_text] = tokens
    longer[ends] = eod_id
    return longer, sizes


def count_text(texts: list[str]) -> tuple[int, int]:
    """(blank-separated words, UTF-8 bytes) of all texts together."""
    words = bytes_text = 0
    for is_ascii in (True, False):
        group = [text for text in texts if text.isascii() is is_ascii]
        if not group:
            continue
        joined = "\n".join(group)
        data = joined.encode()
        bytes_text += len(data) - (len(group) - 1)
        if is_ascii:
            # str.split()'s ASCII blanks are 9 to 13 and 28 to 32; differences below zero wrap around.
            characters = np.frombuffer(data, dtype=np.uint8)
            blank = characters - np.uint8(9) < 5
            blank |= characters - np.uint8(28) < 5
        else:
            blank = _BLANK[
                np.minimum(np.frombuffer(joined.encode("utf-32-le"), dtype="<u4"), len(_BLANK) - 1)
            ]
        if len(blank):
            words += int(np.count_nonzero(blank[:-1] > blank[1:])) + (not blank[0])
    return words, bytes_text


_encoder: Encoder | None = None  # set once in each worker process, never in the parent


def initialize_worker(
    name: str, fingerprint: str, engine: Literal["auto", "reference"], selection: Selection, append_eod: bool
) -> None:
    """Loads what :func:`encode_task` needs, once per process.

    Raises:
        UserError: the tokenizer is not the one of ``fingerprint``.
    """
    global _encoder
    tokenizer = load_tokenizer(name, engine, probed=True)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"tokenizer {name!r}: changed while it was in use; start again with one of the two")
    _encoder = Encoder(tokenizer, selection, append_eod)


def encode_task(task: Task) -> tuple[Task, list[EncodedChunk]]:
    """Encodes the chunks of a task; the task comes back without its chunks."""
    assert _encoder is not None
    encoded = [_encoder.encode(chunk) for chunk in task.chunks]
    return Task((), task.chunk_sources, task.position, task.finished), encoded


@dataclass(frozen=True)
class Position:
    """How much has been read: all sources before ``source`` and ``records`` lines or rows of that one."""

    source: int = 0
    records: int = 0


@dataclass(frozen=True)
class Task:
    """Neighbouring chunks, for one process to work on.

    Args:
        chunks: what to encode.
        chunk_sources: for each chunk the index of its source.
        position: how much has been read when these chunks are done.
        finished: sources whose last chunk is in this task or before: (index, SHA-256 of the file).
    """

    chunks: tuple[Chunk, ...]
    chunk_sources: tuple[int, ...]
    position: Position
    finished: tuple[tuple[int, str | None], ...] = ()
