"""One pass over a ``.bin``: checksums, ids against the vocabulary, and the ends of the documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lpa.data.storage.block_check import BlockComparison
from megatron_lpa.data.storage.byte_progress import ByteProgress
from megatron_lpa.data.storage.indexed import IndexedDataset, bin_path
from megatron_lpa.data.storage.reading import blocks_of
from megatron_lpa.files import from_disk
from megatron_lpa.inspection.problems import ProblemLog

_READ_BYTES = 1 << 22  # a multiple of every item size
_DOCUMENTS = 1 << 13  # ends of documents looked up at a time


@dataclass(frozen=True)
class TokenExpectations:
    """What is known of the tokens; ``None`` for what is not.

    Args:
        digests: hex SHA-256 of every block of ``block_bytes``.
        block_bytes: bytes per block.
        vocab_size: one more than the largest id.
        eod_id: the id that ends every document.
    """

    digests: list[str] | None = None
    block_bytes: int = 1
    vocab_size: int | None = None
    eod_id: int | None = None


def check_tokens(
    prefix: str,
    dtype: np.dtype[Any],
    dataset: IndexedDataset | None,
    expected: TokenExpectations,
    log: ProblemLog,
) -> None:
    """Reads the whole ``.bin``, in blocks.

    Args:
        prefix: path without ``.bin``.
        dtype: of the tokens.
        dataset: to tell documents; ``None`` when the index is damaged.
        expected: what to compare with.
        log: takes what is wrong: kinds ``checksum``, ``token`` and ``end``.

    Raises:
        UserError: the file cannot be read.
        TryAgain: the disk does not give it.
    """
    path = bin_path(prefix)
    size_bytes = from_disk(path.stat, path).st_size
    comparison = (
        BlockComparison(expected.digests, expected.block_bytes) if expected.digests is not None else None
    )
    ends = _Ends(dataset, expected.eod_id) if dataset is not None and expected.eod_id is not None else None
    progress = ByteProgress(f"reading {path}", size_bytes)
    first_token = 0
    for data in blocks_of(path, _READ_BYTES):
        for block in comparison.update(data) if comparison else ():
            log_block(log, path, block, expected.block_bytes, size_bytes)
        tokens = np.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
        if len(tokens):
            _check_range(tokens, first_token, path, dataset, expected.vocab_size, log)
            if ends is not None:
                ends.check(tokens, first_token, path, log)
        first_token += len(tokens)
        progress.add(len(data))
    for block in comparison.finish() if comparison else ():
        log_block(log, path, block, expected.block_bytes, size_bytes)


def log_block(log: ProblemLog, path: Path, block: int, block_bytes: int, size_bytes: int) -> None:
    """Notes that a block is not as the manifest records it."""
    start, stop = block * block_bytes, min((block + 1) * block_bytes, size_bytes)
    if start >= size_bytes:
        message, stop = f"block {block} is recorded, but the file ends before it", start + block_bytes
    else:
        message = f"block {block} does not have the recorded SHA-256"
    log.add("checksum", path, message, start, stop)


def _check_range(
    tokens: np.ndarray,
    first_token: int,
    path: Path,
    dataset: IndexedDataset | None,
    vocab_size: int | None,
    log: ProblemLog,
) -> None:
    limit = vocab_size if vocab_size is not None else np.iinfo(tokens.dtype).max + 1
    if int(tokens.min()) >= 0 and int(tokens.max()) < limit:
        return
    wrong = np.flatnonzero((tokens < 0) | (tokens > limit - 1))
    listed = wrong[: log.wants("token")]
    for offset in listed.tolist():
        position = first_token + offset
        known = dataset is not None and position < dataset.num_tokens
        where = f" of document {_document_of(dataset, position)}" if dataset is not None and known else ""
        vocabulary = f"; the vocabulary has {vocab_size} ids" if vocab_size is not None else ""
        start = position * tokens.dtype.itemsize
        message = f"token {position}{where} is {tokens[offset]}{vocabulary}"
        log.add("token", path, message, start, start + tokens.dtype.itemsize)
    log.count("token", len(wrong) - len(listed))


def _document_of(dataset: IndexedDataset, position: int) -> int:
    """The document that token ``position`` is in."""
    low, high = 0, dataset.num_documents  # the first document that begins after it lies above low
    while high - low > 1:
        middle = (low + high) // 2
        if dataset.document_offset(middle) <= position:
            low = middle
        else:
            high = middle
    return low


class _Ends:
    """Compares the last token of every document with the end-of-document id, while the tokens pass by."""

    def __init__(self, dataset: IndexedDataset, eod_id: int) -> None:
        self._dataset, self._eod_id = dataset, eod_id
        self._next = 0  # the first document whose end has not come yet

    def check(self, tokens: np.ndarray, first_token: int, path: Path, log: ProblemLog) -> None:
        """Looks at the documents that end in ``tokens`` ``(n,)``, which follow those of the last call."""
        dataset, stop_token = self._dataset, first_token + len(tokens)
        while self._next < dataset.num_documents:
            stop = min(self._next + _DOCUMENTS, dataset.num_documents)
            offsets = dataset.document_offsets(np.arange(self._next, stop + 1))
            here = int(np.searchsorted(offsets[1:], stop_token, side="right"))
            starts, stops = offsets[:here], offsets[1 : here + 1]
            # An empty document has no last token: whatever stands before it is another document's.
            last = tokens[np.maximum(stops - 1 - first_token, 0)]
            wrong = np.flatnonzero((starts == stops) | (last != self._eod_id))
            listed = wrong[: log.wants("end")]
            for number in listed.tolist():
                document = self._next + number
                self._log(document, int(starts[number]), int(stops[number]), int(last[number]), path, log)
            log.count("end", len(wrong) - len(listed))
            self._next += here
            if self._next < stop:
                break

    def _log(self, document: int, start: int, stop: int, last: int, path: Path, log: ProblemLog) -> None:
        item = self._dataset.dtype.itemsize
        if start == stop:
            message = f"document {document} is empty, without the end-of-document id {self._eod_id}"
            log.add("end", path, message, start * item, start * item)
        else:
            message = (
                f"document {document} ends with id {last}, not with the end-of-document id {self._eod_id}"
            )
            log.add("end", path, message, (stop - 1) * item, stop * item)
