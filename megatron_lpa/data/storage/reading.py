"""Reading the files of datasets and tokenizers, on disks that hiccup.

What may pass is tried again, by the rule of ``files.py``; what a disk says for good is told to the user.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np

from megatron_lpa.errors import UserError
from megatron_lpa.files import open_regular, patiently, unreadable

Result = TypeVar("Result")


class PatientFile(io.RawIOBase):
    """A regular file whose reads are tried again where the disk does not answer, with the file opened anew.

    As a stream it is unbuffered; :func:`stream_of` gives a buffered one.

    Args:
        path: the file.

    Raises:
        UnusableFile: not a regular file.
        OSError: one of ``files.LASTING``.
        TryAgain: the disk does not give it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._path, self._offset = path, 0
        self._file, self.size_bytes = patiently(self._open, path)

    def _open(self) -> tuple[BinaryIO, int]:
        file = open_regular(self._path)
        try:
            return file, os.fstat(file.fileno()).st_size
        except BaseException:
            file.close()
            raise

    def read_at(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on. Several threads may call it.

        Raises:
            OSError: one of ``files.LASTING``, with the file and the offset.
            TryAgain: the disk does not give them, or the file has become shorter.
        """
        try:
            return self._exactly(offset, length)
        except OSError as error:
            return self._again(error, lambda: self._exactly(offset, length), offset, length)

    def _exactly(self, offset: int, length: int) -> bytes:
        file = self._file  # another thread may open it anew meanwhile
        data = os.pread(file.fileno(), length, offset)
        while len(data) < length:  # the system may give less at a time, and gives nothing behind the end
            more = os.pread(file.fileno(), length - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, f"the file ends at byte {offset + len(data)}")
            data += more
        return data

    def _again(self, error: OSError, read: Callable[[], Result], offset: int, length: int) -> Result:
        """What ``read`` gives after a first attempt that ended with ``error``."""
        first: list[OSError] = [error]

        def attempt() -> Result:
            try:
                if first:
                    raise first.pop()
                self._open_again()
                return read()
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{error.strerror}, reading {length} bytes at offset {offset}",
                    str(self._path),
                ) from error

        return patiently(attempt, self._path)

    def _open_again(self) -> None:
        """A handle that went stale stays so. Another file under the same name is none of ours: the old one
        stays open."""
        try:
            file, size_bytes = self._open()
        except (OSError, UserError):
            return  # the next attempt tells
        if size_bytes != self.size_bytes:
            file.close()
            return
        self._file = file  # the old one closes itself when no thread reads it any more

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        try:
            data = os.pread(self._file.fileno(), len(view), self._offset)
        except OSError as error:
            data = self._again(
                error, lambda: os.pread(self._file.fileno(), len(view), self._offset), self._offset, len(view)
            )
        view[: len(data)] = data
        self._offset += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self.size_bytes}[whence]
        self._offset = max(0, start + offset)
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):  # it is not there where opening failed
            self._file.close()
        super().close()


class TokenReader:
    """The tokens of a ``.bin`` file, which stays open. They are read by system calls, so that an error of the
    disk is an exception: through a mapping, the same error is SIGBUS, which ends the process without a word
    about the file.

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
            TryAgain: with these, after several attempts: the disk does not give them, or the file has become
                shorter.
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


def stream_of(path: str | os.PathLike[str]) -> BinaryIO:
    """A buffered :class:`PatientFile`: a read is shorter than asked for only at the end of the file.

    Raises:
        UserError: it is not a regular file, or cannot be opened for good.
        TryAgain: the disk does not give it.
    """
    try:
        return cast(BinaryIO, io.BufferedReader(PatientFile(path)))
    except OSError as error:
        raise unreadable(path, error) from error


def blocks_of(path: str | os.PathLike[str], block_bytes: int) -> Iterator[bytes]:
    """All of a regular file, in blocks; only the last may be shorter.

    Raises:
        UserError, TryAgain: as :func:`stream_of`, and for what cannot be read later on.
    """
    try:
        with stream_of(path) as stream:
            while data := stream.read(block_bytes):
                yield data
    except OSError as error:
        raise unreadable(path, error) from error
