"""Reading tokens by system calls, so that an error of the disk is an exception.

Read through a mapping, the same error is SIGBUS: it ends the process without a word about the file.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lpa.data.storage.reading import PatientFile
from megatron_lpa.files import patiently


class TokenReader:
    """The tokens of a ``.bin`` file, which stays open.

    Args:
        path: the file.
        dtype: of a token.

    Raises:
        UnusableFile: not a regular file.
        OSError: it cannot be opened, for good.
        TryAgain: the disk does not give it.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._file = PatientFile(path)
        self.size_bytes: int = self._file.size_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop``, ``0 <= start <= stop``: a read-only ``(stop - start,)`` array.

        Raises:
            OSError: with the file and the offset: it may not be read.
            TryAgain: with these, after several attempts: the disk does not give them, or the file has become shorter.
        """
        size = self._dtype.itemsize
        return np.frombuffer(self._file.read_at(start * size, (stop - start) * size), dtype=self._dtype)

    def mapped(self) -> np.ndarray:
        """All tokens, memory-mapped: read-only ``(size_bytes // itemsize,)``; the file must not be empty.

        Raises:
            OSError: it cannot be mapped, for good.
            TryAgain: it cannot be mapped now.
        """
        descriptor = self._file.fileno()
        mapping = patiently(
            lambda: mmap.mmap(descriptor, self.size_bytes, access=mmap.ACCESS_READ), self._path
        )
        return np.frombuffer(mapping, dtype=self._dtype)
