"""The structure of an index, looked at without giving up at the first fault, and with byte offsets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lpa.data.storage.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION, bin_path, idx_path
from megatron_lpa.data.storage.reading import PatientFile, TokenReader
from megatron_lpa.files import from_disk
from megatron_lpa.inspection.problems import ProblemLog

_BLOCK = 1 << 20  # index entries per step
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class _Index:
    """The parts of an index file: sizes int32 ``(N,)``, pointers int64 ``(N,)``, documents int64 ``(D +
    1,)``."""

    path: Path
    dtype: np.dtype[Any]
    sizes: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray

    def size_at(self, sequence: int) -> tuple[int, int]:
        """Byte range of an entry in the file."""
        start = HEADER.size + 4 * sequence
        return start, start + 4

    def pointer_at(self, sequence: int) -> tuple[int, int]:
        start = HEADER.size + 4 * len(self.sizes) + 8 * sequence
        return start, start + 8

    def document_at(self, document: int) -> tuple[int, int]:
        start = HEADER.size + 12 * len(self.sizes) + 8 * document
        return start, start + 8


def check_index(prefix: str, log: ProblemLog, expected_bin_bytes: int | None = None) -> np.dtype[Any] | None:
    """Looks at the whole index, in blocks, and at whether it fits the ``.bin``.

    Args:
        prefix: path without ``.bin`` and ``.idx``; both files exist.
        log: takes what is wrong: kinds ``header``, ``sequences``, ``documents`` and ``length``.
        expected_bin_bytes: the length of the ``.bin`` as the manifest has it, if there is one.

    Returns:
        the dtype of the tokens, ``None`` where the header does not tell.
    """
    path, bin_bytes = idx_path(prefix), from_disk(bin_path(prefix).stat, bin_path(prefix)).st_size
    with PatientFile(path) as file:
        actual_bytes = file.size_bytes
        header = file.read_at(0, min(HEADER.size, actual_bytes))
    if len(header) < HEADER.size:
        log.add("header", path, f"cut short inside its header ({actual_bytes} bytes)", 0, actual_bytes)
        return None
    magic, version, code, num_sequences, num_indices = HEADER.unpack(header)
    if magic != MAGIC:
        log.add("header", path, f"begins with {magic!r}, not with {MAGIC!r}", 0, 9)
    if version != VERSION:
        log.add("header", path, f"index version {version}, not {VERSION}", 9, 17)
    dtype = _DTYPES.get(code)
    if dtype is None or dtype.kind == "f":
        log.add("header", path, f"dtype code {code} is not that of an integer", 17, 18)
        dtype = None
    expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_indices
    if num_sequences == 0 or num_indices < 2 or expected_bytes != actual_bytes:
        log.add(
            "header",
            path,
            f"announces {num_sequences} sequences and {num_indices} document indices, which take "
            f"{expected_bytes} bytes, but the file has {actual_bytes}",
            18,
            34,
        )
        return dtype
    if dtype is None:
        return None
    raw = TokenReader(path, np.dtype(np.uint8)).mapped()
    sizes_end, pointers_end = HEADER.size + 4 * num_sequences, HEADER.size + 12 * num_sequences
    index = _Index(
        path,
        dtype,
        np.asarray(raw[HEADER.size : sizes_end]).view("<i4"),
        np.asarray(raw[sizes_end:pointers_end]).view("<i8"),
        np.asarray(raw[pointers_end:]).view("<i8"),
    )
    _check_sequences(index, bin_path(prefix), bin_bytes, expected_bin_bytes, log)
    _check_documents(index, log)
    return dtype


def _check_sequences(
    index: _Index, bin_file: Path, bin_bytes: int, expected_bin_bytes: int | None, log: ProblemLog
) -> None:
    """Each sequence has to end where the next begins, and the last where the ``.bin`` ends."""
    item, count = index.dtype.itemsize, len(index.sizes)
    explained = -1  # a wrong pointer breaks the sequence before it and its own; the second is no news
    if index.pointers[0] != 0:
        log.add(
            "sequences",
            index.path,
            f"sequence 0 has its pointer at byte {index.pointers[0]}, not at 0",
            *index.pointer_at(0),
        )
        if int(index.sizes[0]) * item == _start_of(index, 1, bin_bytes):
            explained = 0
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        sizes = index.sizes[start:stop].astype(np.int64)
        nexts = index.pointers[start + 1 : stop + 1]
        if stop == count:
            nexts = np.append(nexts, bin_bytes)
        broken = start + np.flatnonzero((index.pointers[start:stop] + sizes * item != nexts) | (sizes < 0))
        described = 0
        for sequence in broken.tolist():
            if not log.wants("sequences"):
                break
            described += 1
            if sequence == explained:
                continue
            if sequence == count - 1 and index.sizes[sequence] >= 0 and expected_bin_bytes != bin_bytes:
                end_bytes = int(index.pointers[-1]) + int(index.sizes[-1]) * item
                log.add(
                    "length",
                    bin_file,
                    f"{bin_bytes} bytes, but {index.path.name} describes {end_bytes}; "
                    f"its last size is at byte {index.size_at(sequence)[0]}",
                    max(min(bin_bytes, end_bytes), 0),
                    max(bin_bytes, end_bytes),
                )
            elif _pointer_is_wrong(index, sequence + 1, bin_bytes):
                explained = sequence + 1
                log.add(
                    "sequences",
                    index.path,
                    f"sequence {sequence + 1} has its pointer at byte {index.pointers[sequence + 1]}, not at "
                    f"{int(index.pointers[sequence]) + int(index.sizes[sequence]) * item}",
                    *index.pointer_at(sequence + 1),
                )
            else:
                room_bytes = _start_of(index, sequence + 1, bin_bytes) - int(index.pointers[sequence])
                log.add(
                    "sequences",
                    index.path,
                    f"sequence {sequence} has the size {index.sizes[sequence]}, but {room_bytes} bytes "
                    f"({item} per token) up to the next one",
                    *index.size_at(sequence),
                )
        log.count("sequences", len(broken) - described)


def _start_of(index: _Index, sequence: int, bin_bytes: int) -> int:
    return int(index.pointers[sequence]) if sequence < len(index.pointers) else bin_bytes


def _pointer_is_wrong(index: _Index, sequence: int, bin_bytes: int) -> bool:
    """Whether another pointer for ``sequence`` would put both it and the one before it right."""
    if sequence >= len(index.sizes) or min(index.sizes[sequence - 1 : sequence + 1]) < 0:
        return False
    sizes_bytes = (int(index.sizes[sequence - 1]) + int(index.sizes[sequence])) * index.dtype.itemsize
    return int(index.pointers[sequence - 1]) + sizes_bytes == _start_of(index, sequence + 1, bin_bytes)


def _check_documents(index: _Index, log: ProblemLog) -> None:
    documents, num_sequences = index.documents, len(index.sizes)
    if documents[0] != 0:
        log.add(
            "documents",
            index.path,
            f"document 0 begins at sequence {documents[0]}, not at 0",
            *index.document_at(0),
        )
    for start in range(0, len(documents) - 1, _BLOCK):
        block = documents[start : start + _BLOCK + 1]
        backwards = start + 1 + np.flatnonzero(block[1:] < block[:-1])
        listed = backwards[: log.wants("documents")]
        for number in listed.tolist():
            log.add(
                "documents",
                index.path,
                f"document indices {number - 1} and {number} go backwards, from {documents[number - 1]} to "
                f"{documents[number]}",
                index.document_at(number - 1)[0],
                index.document_at(number)[1],
            )
        log.count("documents", len(backwards) - len(listed))
    if documents[-1] != num_sequences:
        log.add(
            "documents",
            index.path,
            f"the last document ends at sequence {documents[-1]}, but there are {num_sequences}",
            *index.document_at(len(documents) - 1),
        )
