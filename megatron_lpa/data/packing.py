"""Shuffled documents as one stream of tokens, cut into samples.

With sequence length S, sample ``k`` is tokens ``k S`` to ``k S + S`` of the stream. Its *start* says where
token ``k S`` is: at which position of the document order, and how many tokens into that document.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_lpa.data.order import MAX_DOCUMENTS, DocumentOrder
from megatron_lpa.data.storage.indexed import HEADER, IndexedDataset, idx_path
from megatron_lpa.data.storage.reading import PatientFile
from megatron_lpa.errors import UserError
from megatron_lpa.files import from_disk

_BLOCK_DOCUMENTS = 1 << 17  # per step; its few arrays stay in a core's cache
_READ_DOCUMENTS = 1 << 20


def check_document_count(indexed: IndexedDataset) -> None:
    """Refuses more documents than can be shuffled.

    Raises:
        UserError: there are more.
    """
    if indexed.num_documents > MAX_DOCUMENTS:
        raise UserError(
            f"{indexed.prefix}: {indexed.num_documents} documents, but at most {MAX_DOCUMENTS} can be "
            "shuffled; make several datasets of them, or set data.shuffle_documents to false"
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
                f"{indexed.prefix}: document {start + int(block.argmax())} has {block.max()} tokens, too "
                "many to shuffle; split it, or set data.shuffle_documents to false"
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
