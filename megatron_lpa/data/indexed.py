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

import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_lpa.data.files import PARTIAL_SUFFIX, PartialFile, explained_write_errors, fsync_folder
from megatron_lpa.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, str] = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
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
    """A memory-mapped token dataset; opening it checks the whole index, but reads no tokens.

    A document may consist of several sequences (Megatron splits some by sentences) or of none.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Raises:
        UserError: a file is missing, damaged, empty, or of a kind that training cannot use.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._bin_path, self._idx_path = bin_path(prefix), idx_path(prefix)
        for path in (self._idx_path, self._bin_path):
            if not path.is_file():
                raise UserError(_missing(self.prefix, path))
        self.dtype, num_sequences, num_indices = self._read_header()
        raw = np.memmap(self._idx_path, dtype=np.uint8, mode="r")
        start = _HEADER.size
        sizes_end, pointers_end = start + 4 * num_sequences, start + 12 * num_sequences
        self._sizes = np.asarray(raw[start:sizes_end]).view("<i4")
        self._pointers = np.asarray(raw[sizes_end:pointers_end]).view("<i8")
        self._document_indices = np.asarray(raw[pointers_end:]).view("<i8")
        self.num_documents: int = num_indices - 1
        self.num_tokens: int = self._check_sequences()
        self._check_documents()
        bin_bytes, expected_bytes = self._bin_path.stat().st_size, self.num_tokens * self.dtype.itemsize
        if bin_bytes != expected_bytes:
            raise UserError(
                f"{self._bin_path}: {bin_bytes} bytes, but {self._idx_path.name} describes {expected_bytes}; "
                f"the two do not belong together or one is cut short: {_REBUILD}"
            )
        if self.num_tokens == 0:
            raise UserError(f"{self._bin_path}: holds no tokens; check the input text and {_REBUILD}")
        self._tokens = np.asarray(np.memmap(self._bin_path, dtype=self.dtype, mode="r"))

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        path, actual_bytes = self._idx_path, self._idx_path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            raise UserError(f"{path}: not a Megatron index (it should begin with MMIDIDX); {_REBUILD}")
        if len(header) < _HEADER.size:
            raise UserError(f"{path}: cut short inside its header ({actual_bytes} bytes); {_REBUILD}")
        _, version, code, num_sequences, num_indices = _HEADER.unpack(header)
        if version != _VERSION:
            raise UserError(f"{path}: index version {version}; only version {_VERSION} is known: {_REBUILD}")
        if code not in _DTYPES:
            raise UserError(f"{path}: unknown dtype code {code} (known: 1 to {max(_DTYPES)}); {_REBUILD}")
        dtype = np.dtype(_DTYPES[code])
        if dtype.kind == "f":
            raise UserError(f"{path}: holds {dtype.name} values, not token ids; give a tokenized dataset")
        if num_sequences == 0 or num_indices < 2:
            raise UserError(f"{path}: holds no documents; check the input text and {_REBUILD}")
        expected_bytes = _HEADER.size + 12 * num_sequences + 8 * num_indices
        if actual_bytes == expected_bytes + num_sequences:
            raise UserError(
                f"{path}: a multimodal index (it has a mode per sequence); give a dataset of text only"
            )
        if actual_bytes != expected_bytes:
            what = "cut short" if actual_bytes < expected_bytes else "longer than it should be"
            raise UserError(f"{path}: {what}: {actual_bytes} bytes instead of {expected_bytes}; {_REBUILD}")
        return dtype, num_sequences, num_indices

    def _check_sequences(self) -> int:
        """The number of tokens, once every sequence is known to begin where the one before it ends."""
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
        return end_bytes // self.dtype.itemsize

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
        if problem:
            raise UserError(f"{self._idx_path}: its document indices {problem}; {_REBUILD}")

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return IndexedDataset, (self.prefix,)  # a copy in another process maps the files anew

    def document_offset(self, document: int) -> int:
        """Token position at which ``document`` begins; ``num_documents`` gives the end of the last."""
        if not 0 <= document <= self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.prefix}")
        sequence = int(self._document_indices[document])
        if sequence == len(self._sizes):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_token_offsets(self) -> np.ndarray:
        """Token position at which each document begins, then the end: int64 ``(num_documents + 1,)``."""
        ends = np.append(self._pointers // self.dtype.itemsize, self.num_tokens)
        return ends[self._document_indices]

    def document(self, document: int) -> np.ndarray:
        """The token ids of one document: a read-only ``(tokens,)`` view of ``dtype``."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.prefix}")
        return self._tokens[self.document_offset(document) : self.document_offset(document + 1)]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids ``start`` to ``stop`` of the whole file: a read-only ``(stop - start,)`` view."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens} in {self.prefix}")
        return self._tokens[start:stop]


def _missing(prefix: str, path: Path) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"{path}: no such file; give the prefix without its ending: {prefix[:-4]}"
    if path.with_name(path.name + PARTIAL_SUFFIX).exists():
        return f"{path}: no such file, only an unfinished {path.name}{PARTIAL_SUFFIX}; run the tool again"
    return f"{path}: no such file; give the prefix of a dataset that tools/preprocess_data.py wrote"


class IndexedDatasetWriter:
    """Writes ``<prefix>.bin`` and ``<prefix>.idx``, one sequence per document.

    A context manager. Both files take their names when the block ends well, the ``.idx`` last; when it
    ends with an exception nothing is left, and a killed process leaves only ``*.partial`` files.

    Args:
        prefix: path without ``.bin`` and ``.idx``; its folder is created.
        dtype: an integer dtype with a code in the format; see :func:`best_dtype`.

    Raises:
        UserError: the files cannot be written, or another process is writing them.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any] | type[np.integer[Any]]) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype in _CODES and self.dtype.kind in "iu", f"no code for {self.dtype}"
        self._sizes = array("i")
        self._bin: PartialFile | None = None

    @property
    def num_documents(self) -> int:
        return len(self._sizes)

    def __enter__(self) -> IndexedDatasetWriter:
        self._bin = PartialFile(bin_path(self.prefix))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._bin is not None
        try:
            if kind is None:
                self._publish(self._bin)
        finally:
            self._bin.discard()

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
        self._bin.write(tokens.tobytes())
        self._sizes.extend(sizes.tolist())

    def _publish(self, bin_file: PartialFile) -> None:
        bin_file.finish()
        idx_file = PartialFile(idx_path(self.prefix))
        try:
            sizes = np.frombuffer(self._sizes, dtype=np.int32)
            count = len(sizes)
            pointers = np.zeros(count, dtype=np.int64)
            np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
            pointers *= self.dtype.itemsize
            idx_file.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[self.dtype], count, count + 1))
            idx_file.write(sizes.astype("<i4").tobytes())
            idx_file.write(pointers.astype("<i8").tobytes())
            idx_file.write(np.arange(count + 1, dtype="<i8").tobytes())
            idx_file.finish()
            # An older index must never stand beside the new tokens, not even for a moment.
            with explained_write_errors(idx_file.path):
                idx_file.path.unlink(missing_ok=True)
            bin_file.publish()
            idx_file.publish()
        finally:
            idx_file.discard()
        with explained_write_errors(idx_file.path):
            fsync_folder(idx_file.path.parent)
