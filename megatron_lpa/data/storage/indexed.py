"""The ``.bin``/``.idx`` token files that Megatron-core reads and writes.

``<prefix>.bin`` holds token ids, one after the other. ``<prefix>.idx`` is little-endian:

====================  ===========  ==========================================================
field                 type         meaning
====================  ===========  ==========================================================
magic                 9 bytes      ``MMIDIDX\\0\\0``
version               uint64       1
dtype code            uint8        see ``_DTYPES``
sequence count        uint64       N
document index count  uint64       documents + 1
sizes                 int32 [N]    tokens of each sequence
pointers              int64 [N]    byte offset of each sequence in the ``.bin``
document indices      int64 [..]   first sequence of each document, then N
====================  ===========  ==========================================================
"""

from __future__ import annotations

import io
import mmap
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_lpa.data.storage.nearby import meant_instead
from megatron_lpa.data.storage.partial_file import PARTIAL_SUFFIX
from megatron_lpa.data.storage.reading import TokenReader
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import exists, open_regular, patiently, unreadable

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, str] = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
DTYPE_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_CHECK_BLOCK = 1 << 20  # index entries per step of the checks, so that they need little memory
_REBUILD = "copy it again or rebuild it with tools/preprocess_data.py"


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for a vocabulary below 65500 tokens, else int32: the rule of Megatron's tools."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """A token dataset; opening it checks the whole index, but reads no tokens.

    The index and whole documents are memory-mapped. What training reads, ``tokens``, is not (see
    ``reading.py``).

    A document may consist of several sequences (Megatron splits some by sentences) or of none.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        check: look at every sequence and document of the index. ``False`` is for those who know that the
            same files passed before; headers and file sizes are checked all the same.

    Raises:
        UserError: a file is missing, damaged, empty, or of a kind that training cannot use.
        TryAgain: the disk does not give a file.
    """

    def __init__(self, prefix: str | Path, check: bool = True) -> None:
        self.prefix = str(prefix)
        self._bin_path, self._idx_path = bin_path(prefix), idx_path(prefix)
        try:
            self._open(check)
        except OSError as error:
            raise unreadable(self.prefix, error) from error

    def _open(self, check: bool) -> None:
        for path in (self._idx_path, self._bin_path):
            if not exists(path):
                raise UserError(_missing(self.prefix, path))
        self.dtype, num_sequences, num_indices = patiently(self._map_index, self._idx_path)
        raw = np.frombuffer(self._map, dtype=np.uint8)
        start = HEADER.size
        sizes_end, pointers_end = start + 4 * num_sequences, start + 12 * num_sequences
        self._sizes = np.asarray(raw[start:sizes_end]).view("<i4")
        self._pointers = np.asarray(raw[sizes_end:pointers_end]).view("<i8")
        self._document_indices = np.asarray(raw[pointers_end:]).view("<i8")
        self.num_sequences: int = num_sequences
        self.num_documents: int = num_indices - 1
        self._reader = TokenReader(self._bin_path, self.dtype)
        if check:
            end_bytes = self._check_sequences()
            self._check_documents()
        else:
            end_bytes = int(self._pointers[-1]) + int(self._sizes[-1]) * self.dtype.itemsize
        self.num_tokens: int = end_bytes // self.dtype.itemsize
        bin_bytes, expected_bytes = self._reader.size_bytes, self.num_tokens * self.dtype.itemsize
        if bin_bytes != expected_bytes:
            raise UserError(
                f"{self._bin_path}: {bin_bytes} bytes, but {self._idx_path.name} describes {expected_bytes}; "
                f"the two do not belong together or one is cut short: {_REBUILD}"
            )
        if self.num_tokens == 0:
            raise UserError(f"{self._bin_path}: holds no tokens; check the input text and {_REBUILD}")

    def _map_index(self) -> tuple[np.dtype[Any], int, int]:
        """Maps the index once its header fits its size; dtype, sequences and document indices. One
        attempt."""
        with io.BufferedReader(cast(io.RawIOBase, open_regular(self._idx_path))) as stream:
            actual_bytes = os.fstat(stream.fileno()).st_size
            described = self._read_header(stream.read(HEADER.size), actual_bytes)
            self._map = mmap.mmap(stream.fileno(), actual_bytes, access=mmap.ACCESS_READ)
        return described

    def _read_header(self, header: bytes, actual_bytes: int) -> tuple[np.dtype[Any], int, int]:
        path = self._idx_path
        if not header.startswith(MAGIC):
            raise UserError(f"{path}: not a Megatron index (it should begin with MMIDIDX); {_REBUILD}")
        if len(header) < HEADER.size:
            raise UserError(f"{path}: cut short inside its header ({actual_bytes} bytes); {_REBUILD}")
        _, version, code, num_sequences, num_indices = HEADER.unpack(header)
        if version != VERSION:
            raise UserError(f"{path}: index version {version}; only version {VERSION} is known: {_REBUILD}")
        if code not in _DTYPES:
            raise UserError(f"{path}: unknown dtype code {code} (known: 1 to {max(_DTYPES)}); {_REBUILD}")
        dtype = np.dtype(_DTYPES[code])
        if dtype.kind == "f":
            raise UserError(f"{path}: holds {dtype.name} values, not token ids; give a tokenized dataset")
        if num_sequences == 0 or num_indices < 2:
            raise UserError(f"{path}: holds no documents; check the input text and {_REBUILD}")
        expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_indices
        if actual_bytes == expected_bytes + num_sequences:
            raise UserError(
                f"{path}: a multimodal index (it has a mode per sequence); give a dataset of text only"
            )
        if actual_bytes != expected_bytes:
            what = "cut short" if actual_bytes < expected_bytes else "longer than it should be"
            raise UserError(f"{path}: {what}: {actual_bytes} bytes instead of {expected_bytes}; {_REBUILD}")
        return dtype, num_sequences, num_indices

    def _check_sequences(self) -> int:
        """Where the last sequence ends, in bytes, once each is known to begin where the one before it
        ends."""
        end_bytes = 0
        for start in range(0, len(self._sizes), _CHECK_BLOCK):
            sizes = self._sizes[start : start + _CHECK_BLOCK].astype(np.int64)
            pointers = self._pointers[start : start + _CHECK_BLOCK]
            if sizes.min() < 0:
                raise self._bad_sequence(start + int(sizes.argmin()), f"a negative size ({sizes.min()})")
            ends = end_bytes + np.cumsum(sizes) * self.dtype.itemsize
            wrong = np.flatnonzero(pointers != ends - sizes * self.dtype.itemsize)
            if wrong.size:
                first = int(wrong[0])
                pointer, expected = (
                    int(pointers[first]),
                    int(ends[first] - sizes[first] * self.dtype.itemsize),
                )
                raise self._bad_sequence(
                    start + first,
                    f"a negative pointer ({pointer})"
                    if pointer < 0
                    else f"its pointer at byte {pointer}, not at {expected} where the one before it ends "
                    "(sequences have to lie one after the other)",
                )
            end_bytes = int(ends[-1])
            self._forget_pages()
        return end_bytes

    def _forget_pages(self) -> None:
        """Lets go of what was read of the index, or a long one would count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _bad_sequence(self, sequence: int, problem: str) -> UserError:
        return UserError(f"{self._idx_path}: sequence {sequence} has {problem}; {_REBUILD}")

    def _check_documents(self) -> None:
        indices, num_sequences = self._document_indices, len(self._sizes)
        problem = ""
        if indices[0] != 0:
            problem = f"begin at {indices[0]}, not at 0"
        elif indices[-1] != num_sequences:
            problem = f"end at {indices[-1]}, but there are {num_sequences} sequences"
        for start in range(0, len(indices) - 1, _CHECK_BLOCK):
            block = indices[start : start + _CHECK_BLOCK + 1]
            backwards = np.flatnonzero(block[1:] < block[:-1])
            if not problem and backwards.size:
                problem = f"go backwards at document {start + int(backwards[0])}"
            self._forget_pages()
        if problem:
            raise UserError(f"{self._idx_path}: its document indices {problem}; {_REBUILD}")

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str, bool]]:
        return IndexedDataset, (self.prefix, False)  # a copy in another process maps the files anew

    def document_offset(self, document: int) -> int:
        """Token position at which ``document`` begins; ``num_documents`` gives the end of the last."""
        if not 0 <= document <= self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.prefix}")
        sequence = int(self._document_indices[document])
        if sequence == len(self._sizes):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_offsets(self, documents: np.ndarray) -> np.ndarray:
        """Token position at which each of ``documents`` begins: integers ``(n,)`` to int64 ``(n,)``.

        ``num_documents`` may be among them and gives the end of the last document.
        """
        sequences = self._document_indices[documents]
        past_end = sequences == len(self._sizes)  # the end, and documents without sequences just before it
        if past_end.any():
            offsets = self._pointers[np.where(past_end, 0, sequences)] // self.dtype.itemsize
            return np.where(past_end, self.num_tokens, offsets)
        return self._pointers[sequences] // self.dtype.itemsize

    def document_sizes(self, start: int, stop: int) -> np.ndarray:
        """Tokens of documents ``start`` to ``stop``: int64 ``(stop - start,)``."""
        return np.diff(self.document_offsets(np.arange(start, stop + 1)))

    def document_token_offsets(self) -> np.ndarray:
        """Token position at which each document begins, then the end: int64 ``(num_documents + 1,)``."""
        return self.document_offsets(np.arange(self.num_documents + 1))

    def document(self, document: int) -> np.ndarray:
        """The token ids of one document: a read-only ``(tokens,)`` view of ``dtype``."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.prefix}")
        return self._tokens[self.document_offset(document) : self.document_offset(document + 1)]

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self._reader.mapped()

    def sequence_sizes(self, start: int, stop: int) -> np.ndarray:
        """Tokens of sequences ``start`` to ``stop``: a read-only int32 ``(stop - start,)`` view of the
        index."""
        if not 0 <= start <= stop <= self.num_sequences:
            raise IndexError(f"sequences {start}:{stop} of {self.num_sequences} in {self.prefix}")
        return self._sizes[start:stop]

    def document_indices(self, start: int, stop: int) -> np.ndarray:
        """First sequence of documents ``start`` to ``stop``: a read-only int64 ``(stop - start,)`` view.

        There are ``num_documents + 1`` of them; the last is ``num_sequences``.
        """
        if not 0 <= start <= stop <= self.num_documents + 1:
            raise IndexError(f"document indices {start}:{stop} of {self.num_documents + 1} in {self.prefix}")
        return self._document_indices[start:stop]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids ``start`` to ``stop`` of the whole file: a read-only ``(stop - start,)`` copy.

        Raises:
            TryAgain: the disk does not give them after several attempts, or the file has become shorter.
            OSError: they may not be read.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens} in {self.prefix}")
        return self._reader.read(start, stop)


def check_output_prefix(prefix: str, option: str) -> None:
    """Refuses what cannot be the beginning of file names.

    Raises:
        UserError: it is empty, ends as a folder does, or cannot be looked up.
    """
    name = Path(prefix).name
    if not name or prefix.endswith("/") or name in (".", ".."):
        raise UserError(
            f"{option} is {prefix!r}, which lacks the beginning of a file name; give for example data/corpus"
        )
    try:
        exists(idx_path(prefix))
    except TryAgain:
        raise
    except UserError as error:
        raise UserError(f"{option} is {prefix!r}, which cannot be used: {error}") from error


def _missing(prefix: str, path: Path) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"{path}: no such file; give the prefix without its ending: {prefix[:-4]}"
    if exists(path.with_name(path.name + PARTIAL_SUFFIX)):
        return f"{path}: no such file, only an unfinished {path.name}{PARTIAL_SUFFIX}; run the tool again"
    return f"{path}: no such file; {meant_instead(prefix)}"
