"""Writing the files that ``indexed.py`` reads, in one go or with interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_lpa.data.storage.checksums import BLOCK_BYTES, BlockHasher
from megatron_lpa.data.storage.dataset_manifest import Checksums
from megatron_lpa.data.storage.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION, bin_path, idx_path
from megatron_lpa.data.storage.partial_file import PartialFile, explained_write_errors
from megatron_lpa.data.storage.reading import blocks_of, stream_of
from megatron_lpa.errors import UserError
from megatron_lpa.files import fsync_folder

_INDEX_BLOCK = 1 << 20  # entries of the index in memory at a time


@dataclass(frozen=True)
class WriterPosition:
    """How far a writer has come, for another one to go on there.

    Args:
        sequences: sequences written.
        tokens: tokens written.
        digests: hex SHA-256 of the whole blocks of the ``.bin`` so far.
    """

    sequences: int = 0
    tokens: int = 0
    digests: tuple[str, ...] = ()


class IndexedDatasetWriter:
    """Writes ``<prefix>.bin`` and ``<prefix>.idx``, one sequence per document.

    A context manager. Both files take their names when the block ends well, the ``.idx`` last; when it
    ends with an exception nothing is left, and a killed process leaves only ``*.partial`` files. The sizes
    of the documents wait on disk, so memory does not grow with their number.

    Args:
        prefix: path without ``.bin`` and ``.idx``; its folder is created.
        dtype: an integer dtype with a code in the format; see :func:`indexed.best_dtype`.
        position: where an earlier writer's unfinished files are to be continued.

    Raises:
        UserError: the files cannot be written, or another process is writing them.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: np.dtype[Any] | type[np.integer[Any]],
        position: WriterPosition | None = None,
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype in DTYPE_CODES and self.dtype.kind in "iu", f"no code for {self.dtype}"
        self._start = position or WriterPosition()
        self.num_documents = self._start.sequences
        self.num_tokens = self._start.tokens
        self._published = False
        self._bin: PartialFile | None = None

    def __enter__(self) -> IndexedDatasetWriter:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self.close()

    def open(self) -> None:
        """Opens the unfinished files, cut off at the position given."""
        self._bin = PartialFile.open(bin_path(self.prefix), self._start.tokens * self.dtype.itemsize)
        try:
            self._sizes = PartialFile.open(sizes_path(self.prefix), 4 * self._start.sequences)
            self._hasher = BlockHasher(digests=self._start.digests)
            self._hash_unfinished_block(self._bin)
        except BaseException:
            self._bin.close()
            raise

    def close(self, keep_unfinished: bool = False) -> None:
        """Ends the writing; unfinished files are removed, or kept for a later writer."""
        assert self._bin is not None, "use the writer in a with block"
        if keep_unfinished and not self._published:
            self._bin.close()
            self._sizes.close()
        else:
            self._bin.discard()
            self._sizes.discard()

    def _hash_unfinished_block(self, bin_file: PartialFile) -> None:
        start = len(self._start.digests) * BLOCK_BYTES
        with explained_write_errors(bin_file.partial_path), stream_of(bin_file.partial_path) as stream:
            stream.seek(start)
            self._hasher.update(stream.read())

    def add_document(self, tokens: np.ndarray) -> None:
        """Appends one document: integer ids ``(tokens,)``.

        Raises:
            UserError: an id does not fit the dtype, the document is too long, or the disk is full.
        """
        self.add_documents(tokens, np.array([len(tokens)]))

    def add_documents(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Appends documents given as all their ids ``(sum(sizes),)`` and the length of each.

        Raises:
            UserError: an id does not fit the dtype, a document is too long, or the disk is full.
        """
        assert self._bin is not None, "use the writer in a with block"
        assert tokens.ndim == 1 and tokens.dtype.kind in "iu" and int(sizes.sum()) == len(tokens)
        if tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if tokens.size and (tokens.min() < limits.min or tokens.max() > limits.max):
                wrong = tokens.min() if tokens.min() < limits.min else tokens.max()
                raise UserError(
                    f"{self.prefix}: token id {wrong} does not fit {self.dtype.name} "
                    f"({limits.min} to {limits.max}); the dtype has to follow the tokenizer's vocabulary size"
                )
            tokens = tokens.astype(self.dtype)
        longest = int(sizes.max(initial=0))
        if longest > np.iinfo(np.int32).max:
            raise UserError(
                f"{self.prefix}: a document of {longest} tokens exceeds the format's limit; split it"
            )
        data = np.ascontiguousarray(tokens).data
        self._bin.write(data)
        self._hasher.update(data)
        self._sizes.write(sizes.astype("<i4").tobytes())
        self.num_documents += len(sizes)
        self.num_tokens += len(tokens)

    @property
    def position(self) -> WriterPosition:
        """Where another writer can go on once :meth:`sync` was called."""
        return WriterPosition(self.num_documents, self.num_tokens, tuple(self._hasher.whole_digests()))

    def sync(self) -> None:
        """Brings everything added so far to disk.

        Raises:
            UserError: the disk is full.
        """
        assert self._bin is not None, "use the writer in a with block"
        self._bin.finish()
        self._sizes.finish()

    def publish(self) -> Checksums:
        """Gives the two files their names, the index last; the writer takes no more documents."""
        assert self._bin is not None, "use the writer in a with block"
        self.sync()
        idx_file, idx_digests = write_index(
            self.prefix,
            self.dtype,
            lambda: _read_sizes(self._sizes.partial_path),
            self.num_documents,
            _one_sequence_each(self.num_documents),
            self.num_documents,
        )
        publish_dataset(self._bin, idx_file)
        self._published = True
        return Checksums(self._hasher.digests(), idx_digests)


def sizes_path(prefix: str | Path) -> Path:
    """Where a writer keeps the sizes of its documents, as ``*.partial``, until the index is written."""
    return Path(f"{prefix}.sizes")


def write_index(
    prefix: str | Path,
    dtype: np.dtype[Any],
    read_sizes: Callable[[], Iterable[np.ndarray]],
    num_sequences: int,
    document_indices: Iterable[np.ndarray],
    num_documents: int,
) -> tuple[PartialFile, list[str]]:
    """Writes ``<prefix>.idx.partial``, block by block.

    Args:
        prefix: path without ``.idx``.
        dtype: of the tokens.
        read_sizes: yields the tokens of all sequences, integers, in blocks; called twice.
        num_sequences: how many sizes that gives.
        document_indices: the first sequence of every document and ``num_sequences`` at the end, in blocks.
        num_documents: one less than how many indices that gives.

    Returns:
        the finished but not published file, and the checksums of its blocks.

    Raises:
        UserError: it cannot be written.
    """
    hasher = BlockHasher()
    file = PartialFile.open(idx_path(prefix))

    def write(data: bytes) -> None:
        file.write(data)
        hasher.update(data)

    try:
        write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[np.dtype(dtype)], num_sequences, num_documents + 1))
        written = 0
        for sizes in read_sizes():
            write(sizes.astype("<i4").tobytes())
            written += len(sizes)
        assert written == num_sequences, (written, num_sequences)
        start_bytes = 0
        for sizes in read_sizes():
            ends = start_bytes + np.cumsum(sizes, dtype=np.int64) * np.dtype(dtype).itemsize
            write((ends - sizes.astype(np.int64) * np.dtype(dtype).itemsize).astype("<i8").tobytes())
            start_bytes = int(ends[-1]) if len(ends) else start_bytes
        written = 0
        for indices in document_indices:
            write(indices.astype("<i8").tobytes())
            written += len(indices)
        assert written == num_documents + 1, (written, num_documents)
        file.finish()
    except BaseException:
        file.discard()
        raise
    return file, hasher.digests()


def publish_dataset(bin_file: PartialFile, idx_file: PartialFile) -> None:
    """Gives two finished files their names, the index last.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        # An older index must never stand beside the new tokens, not even for a moment.
        with explained_write_errors(idx_file.path):
            idx_file.path.unlink(missing_ok=True)
        bin_file.publish()
        idx_file.publish()
    finally:
        idx_file.discard()
    with explained_write_errors(idx_file.path):
        fsync_folder(idx_file.path.parent)


def _read_sizes(path: Path) -> Iterator[np.ndarray]:
    for data in blocks_of(path, 4 * _INDEX_BLOCK):
        yield np.frombuffer(data, dtype="<i4")


def _one_sequence_each(count: int) -> Iterator[np.ndarray]:
    for start in range(0, count + 1, _INDEX_BLOCK):
        yield np.arange(start, min(start + _INDEX_BLOCK, count + 1), dtype="<i8")
