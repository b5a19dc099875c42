"""Reading tokens by system calls, so that an error of the disk is an exception.

Read through a mapping, the same error is SIGBUS: it ends the process without a word about the file.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)
"""What network disks answer while a server is away, and may not answer a moment later."""

PAUSES_S = (0.1, 0.5, 2.0)
"""Before the second, third and fourth attempt."""


class TokenReader:
    """The tokens of a ``.bin`` file, which stays open.

    Args:
        path: the file.
        dtype: of a token.
        num_tokens: that the file holds.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], num_tokens: int) -> None:
        self._path, self._dtype, self._num_tokens = path, dtype, num_tokens
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed when this object goes

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop``, ``0 <= start <= stop <= num_tokens``: a read-only ``(stop - start,)`` array.

        Raises:
            OSError: with the file and the offset: the disk does not give them, or the file has become shorter. Where
                that may pass, only after several attempts.
        """
        size = self._dtype.itemsize
        offset, length = start * size, (stop - start) * size
        for pause_s in (*PAUSES_S, None):
            try:
                return np.frombuffer(self._pread(length, offset), dtype=self._dtype)
            except OSError as error:
                if error.errno not in TRANSIENT or pause_s is None:
                    raise OSError(
                        error.errno,
                        f"{error.strerror}, reading {length} bytes at offset {offset}",
                        str(self._path),
                    ) from error
                time.sleep(pause_s)
            self._open_again()
        raise AssertionError("the last attempt returns or raises")

    def _pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self._file.fileno(), length, offset)
        while len(data) < length:  # the system may give less at a time, and gives nothing behind the end
            more = os.pread(self._file.fileno(), length - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, f"the file ends at byte {offset + len(data)}")
            data += more
        return data

    def _open_again(self) -> None:
        """A handle that went stale stays so. Another file under the same name is none of ours: the old one stays open."""
        try:
            file = open(self._path, "rb", buffering=0)  # noqa: SIM115 - as above
        except OSError:
            return  # the next attempt tells
        if os.fstat(file.fileno()).st_size != self._num_tokens * self._dtype.itemsize:
            file.close()
            return
        self._file.close()
        self._file = file
