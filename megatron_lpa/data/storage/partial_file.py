"""Files that grow for hours and appear whole or not at all.

``files.write_whole`` is for small ones: here a killed process leaves what a later one goes on with, and a
lock keeps two from writing one file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import LASTING, fsync_folder

PARTIAL_SUFFIX = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WrittenElsewhere(UserError):
    """Another process is writing the file."""


@contextlib.contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` about ``path`` into a :class:`UserError` that says what to do.

    It is a :class:`TryAgain` where the disk, or who fills it, may let the next attempt pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise TryAgain(
                f"{path}: no room to write ({error.strerror}); free space, raise the quota, "
                "or write to another folder"
            ) from error
        kind = UserError if error.errno in LASTING else TryAgain
        raise kind(
            f"{path}: cannot write ({error.strerror or error}); check the folder and its permissions"
        ) from error


class PartialFile:
    """A file under construction at ``<path>.partial``.

    ``write`` fills it, ``finish`` brings it to disk, ``publish`` gives it its name; ``discard`` removes it.
    The name is fixed, so that the leftover of a killed process is reused instead of piling up, and a lock
    keeps two live processes from writing the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial_path = path.with_name(path.name + PARTIAL_SUFFIX)
        self._lock_file: Path | None = None
        self._stream: BinaryIO

    @classmethod
    def open(cls, path: Path, keep_bytes: int = 0) -> PartialFile:
        """Make the file, or go on with what is left of it.

        Args:
            path: the name of the finished file; its folder is created.
            keep_bytes: how much of a leftover to keep and go on after; the rest is cut off.

        Raises:
            UserError: the folder cannot be written, the disk is full, the leftover is shorter than
                ``keep_bytes``, or another process is writing ``path`` (:class:`WrittenElsewhere`).
        """
        file = cls(path)
        with explained_write_errors(file.partial_path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = file._open_locked(keep_bytes)
            except BaseException:
                file._release()
                raise
            os.lseek(descriptor, 0, os.SEEK_END)
            file._stream = os.fdopen(descriptor, "wb", buffering=1 << 20)
        return file

    def _open_locked(self, keep_bytes: int) -> int:
        while True:
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise WrittenElsewhere(
                    f"{self.path}: another process is writing it; wait for that one or choose another name"
                ) from None
            except OSError:  # a file system without locks
                self._take_lock_file(descriptor)
            # Its last owner may have renamed or removed the file between our open and our lock;
            # truncating then would destroy a finished file.
            with contextlib.suppress(FileNotFoundError):
                status = os.fstat(descriptor)
                if os.path.samestat(status, os.stat(self.partial_path)):
                    if status.st_size < keep_bytes:
                        os.close(descriptor)
                        raise UserError(
                            f"{self.partial_path}: {status.st_size} bytes are left of at least {keep_bytes}; "
                            "it was changed since it was written, so start again without it"
                        )
                    os.ftruncate(descriptor, keep_bytes)
                    return descriptor
            os.close(descriptor)

    def _open(self) -> int:
        """The leftover, or a new file. A link, or a file that has another name as well, is let go of first:
        what it leads to stays as it is.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        while True:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(self.partial_path)
                if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                    os.unlink(self.partial_path)
            descriptor = os.open(self.partial_path, flags, 0o666)
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
                return descriptor
            os.close(descriptor)

    def _take_lock_file(self, descriptor: int) -> None:
        """A file that only one process can create stands in for a lock; a killed process leaves it behind."""
        if self._lock_file is not None:
            return
        lock = self.partial_path.with_name(f"{self.partial_path.name}.lock")
        try:
            with open(lock, "x") as stream:
                stream.write(f"{os.uname().nodename} {os.getpid()}\n")
        except FileExistsError:
            os.close(descriptor)
            raise WrittenElsewhere(
                f"{self.path}: another process may be writing it, as this file system has no locks and "
                f"{lock} exists; it names the process: if that one is gone, remove the file"
            ) from None
        self._lock_file = lock

    def _release(self) -> None:
        if self._lock_file is not None:
            self._lock_file.unlink(missing_ok=True)
            self._lock_file = None

    def write(self, data: bytes | memoryview) -> None:
        with explained_write_errors(self.partial_path):
            self._stream.write(data)

    def finish(self) -> None:
        """Brings everything written so far to disk."""
        with explained_write_errors(self.partial_path):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def publish(self) -> None:
        """Renames the finished file to its name, over an older one."""
        with explained_write_errors(self.path):
            os.replace(self.partial_path, self.path)
            self._stream.close()
            self._release()

    def close(self) -> None:
        """Leaves the unfinished file for a later process to go on with; harmless after ``publish``."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self._release()

    def discard(self) -> None:
        """Removes the unfinished file; harmless after ``publish``."""
        if self._stream.closed:
            return
        # Removed before the lock goes, so that it cannot be another process's file by then.
        self.partial_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the last buffer may not fit a full disk
            self._stream.close()
        self._release()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` to ``path`` as indented JSON, whole or not at all."""
    file = PartialFile.open(path)
    try:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        file.finish()
        file.publish()
    finally:
        file.discard()
    fsync_folder(path.parent)
