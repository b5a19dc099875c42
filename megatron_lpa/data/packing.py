"""Shuffled documents as one stream of tokens, cut into samples.

With sequence length S, sample ``k`` is tokens ``k S`` to ``k S + S`` of the stream. Its *start* says where token
``k S`` is: at which position of the document order, and how many tokens into that document.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_lpa.data.document_order import MAX_DOCUMENTS, DocumentOrder
from megatron_lpa.data.storage.indexed import HEADER, IndexedDataset, idx_path
from megatron_lpa.data.storage.reading import PatientFile, from_disk
from megatron_lpa.errors import UserError

_BLOCK_DOCUMENTS = 1 << 17  # per step; its few arrays stay in a core's cache
_READ_DOCUMENTS = 1 << 20


def check_document_count(indexed: IndexedDataset) -> None:
    """Refuses more documents than can be shuffled.

    Raises:
        UserError: there are more.
    """
    if indexed.num_documents > MAX_DOCUMENTS:
        raise UserError(
            f"{indexed.prefix}: {indexed.num_documents} documents, but at most {MAX_DOCUMENTS} can be shuffled; "
            "make several datasets of them, or set data.shuffle_documents to false"
        )


def read_document_sizes(indexed: IndexedDataset) -> np.ndarray:
    """Tokens of every document, int32 ``(num_documents,)``, in memory of our own.

    Raises:
        UserError: a document, or the number of documents, is too large to shuffle.
        TryAgain: the disk does not give the index.
    """
    check_document_count(indexed)
    sizes = np.empty(indexed.num_documents, dtype=np.int32)
    path = idx_path(indexed.prefix)
    num_sequences = indexed.num_sequences

    def read(start: int) -> None:
        stop = min(start + _READ_DOCUMENTS, len(sizes))
        if num_sequences == len(sizes) and _one_sequence_each(path, num_sequences, start, stop):
            # Read, not mapped: pages of a mapped table would count as this process's memory.
            sizes[start:stop] = _read(path, "<i4", HEADER.size + 4 * start, stop - start)
            return
        block = indexed.document_sizes(start, stop)
        if block.max() > np.iinfo(np.int32).max:
            raise UserError(
                f"{indexed.prefix}: document {start + int(block.argmax())} has {block.max()} tokens, too many "
                "to shuffle; split it, or set data.shuffle_documents to false"
            )
        sizes[start:stop] = block

    with ThreadPoolExecutor(_threads()) as pool:
        list(pool.map(read, range(0, len(sizes), _READ_DOCUMENTS)))
    return sizes


def sample_starts(
    sizes: np.ndarray, order: DocumentOrder, document_range: tuple[int, int], sequence_length: int
) -> tuple[np.ndarray, int]:
    """Where the samples of a range of the document order begin.

    Args:
        sizes: tokens of every document, int32 ``(order.num_documents,)``.
        order: in which documents are read.
        document_range: positions ``start`` to ``stop`` of that order.
        sequence_length: S, tokens per sequence.

    Returns:
        uint32 ``(samples + 1, 2)``, position and offset of tokens 0, S, 2 S, ... of the stream, the last
        row being the last id of the last sample; empty where there is no sample. And the stream's tokens.
    """
    start, stop = document_range
    starts = np.empty((int(sizes.sum(dtype=np.int64)) // sequence_length + 2, 2), dtype=np.uint32)
    running = _RunningTotal()

    def pack(block: int) -> None:
        first = start + block * _BLOCK_DOCUMENTS
        lengths = sizes[order.range(first, min(first + _BLOCK_DOCUMENTS, stop))]
        ends = np.cumsum(lengths, dtype=np.int64)
        before = running.add(block, int(ends[-1]))
        # Token k S is in this block for these k; a document without tokens holds none of them.
        samples = slice(-(-before // sequence_length), -(-(before + int(ends[-1])) // sequence_length))
        tokens = np.arange(samples.start, samples.stop, dtype=np.int64) * sequence_length - before
        documents = np.searchsorted(ends, tokens, side="right")
        starts[samples, 0] = documents + first
        starts[samples, 1] = tokens - (ends[documents] - lengths[documents])

    with ThreadPoolExecutor(_threads()) as pool:
        list(pool.map(running.guarded(pack), range(-(-(stop - start) // _BLOCK_DOCUMENTS))))
    num_samples = max(0, running.total - 1) // sequence_length
    return starts[: num_samples + 1 if num_samples else 0], running.total


class PackedDocuments:
    """Samples of shuffled documents.

    Args:
        indexed: the token files.
        order: in which documents are read.
        starts: what :func:`sample_starts` returned, for the same sequence length.
        sequence_length: S, tokens per sequence.
    """

    def __init__(
        self, indexed: IndexedDataset, order: DocumentOrder, starts: np.ndarray, sequence_length: int
    ) -> None:
        self._indexed = indexed
        self._order = order
        self._starts = starts
        self._sequence_length = sequence_length

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Samples by index: integers ``(b,)`` to int64 ``(b, S + 1)``.

        Raises:
            UserError: the dataset's files have changed since the index was made.
        """
        length = self._sequence_length + 1
        first = self._starts[samples].astype(np.int64)
        last = self._starts[samples + 1].astype(np.int64)
        counts = last[:, 0] - first[:, 0] + 1
        if counts.min() < 1 or last[:, 0].max() >= self._order.num_documents:
            raise self._changed()
        # All documents of all samples at once: a dozen NumPy calls a batch, not a dozen a sample.
        firsts = np.cumsum(counts) - counts
        positions = np.arange(int(counts.sum())) + np.repeat(first[:, 0] - firsts, counts)
        documents = self._order.at(positions).astype(np.int64)
        offsets = self._indexed.document_offsets(np.concatenate((documents, documents + 1)))
        begins, ends = offsets[: len(documents)].copy(), offsets[len(documents) :].copy()
        lasts = firsts + counts - 1
        ends[lasts] = begins[lasts] + last[:, 1] + 1
        begins[firsts] += first[:, 1]
        if begins.min() < 0 or ends.max() > self._indexed.num_tokens or (ends < begins).any():
            raise self._changed()
        if (np.add.reduceat(ends - begins, firsts) != length).any():
            raise self._changed()
        tokens = np.empty(len(samples) * length, dtype=np.int64)
        filled = 0
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            tokens[filled : filled + end - begin] = self._indexed.tokens(begin, end)
            filled += end - begin
        return tokens.reshape(len(samples), length)

    def _changed(self) -> UserError:
        return UserError(
            f"{self._indexed.prefix}: its documents are not those that its sample index was made of; if the "
            "files were replaced during the run, start again"
        )


class _RunningTotal:
    """Adds up what blocks worked on by several threads hold, in the order of the blocks."""

    def __init__(self) -> None:
        self.total = 0
        self._next_block = 0
        self._failed = False
        self._changed = threading.Condition()

    def add(self, block: int, amount: int) -> int:
        """The total before ``block``, once all earlier blocks have been added."""
        with self._changed:
            self._changed.wait_for(lambda: self._next_block == block or self._failed)
            if self._next_block != block:
                raise RuntimeError("another block failed")
            before = self.total
            self.total += amount
            self._next_block += 1
            self._changed.notify_all()
            return before

    def guarded(self, work: Callable[[int], None]) -> Callable[[int], None]:
        """``work`` that, should it fail, leaves no other block waiting for its total."""

        def run(block: int) -> None:
            try:
                work(block)
            except BaseException:
                with self._changed:
                    self._failed = True
                    self._changed.notify_all()
                raise

        return run


def _one_sequence_each(path: Path, num_sequences: int, start: int, stop: int) -> bool:
    """Whether documents ``start`` to ``stop`` are the sequences of these numbers."""
    offset = HEADER.size + 12 * num_sequences + 8 * start
    indices = _read(path, "<i8", offset, stop - start + 1)
    return bool((indices == np.arange(start, stop + 1)).all())


def _read(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    """``count`` numbers from byte ``offset`` on: ``(count,)`` of ``dtype``."""

    def read() -> bytes:
        with PatientFile(path) as file:
            return file.read_at(offset, count * np.dtype(dtype).itemsize)

    return np.frombuffer(from_disk(read, path), dtype)


def _threads() -> int:
    """NumPy lets go of the interpreter's lock while it computes; beyond a few threads memory is the limit."""
    return min(4, len(os.sched_getaffinity(0)))
