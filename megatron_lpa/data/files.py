"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lpa.errors import UserError

PARTIAL_SUFFIX = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` about ``path`` into a :class:`UserError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{path}: no room to write ({error.strerror}); free space, raise the quota, "
                "or write to another folder"
            ) from error
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}); check the folder and its permissions"
        ) from error


def fsync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PartialFile:
    """A file under construction at ``<path>.partial``.

    ``write`` fills it, ``finish`` brings it to disk, ``publish`` gives it its name; ``discard`` removes it.
    The name is fixed, so that the leftover of a killed process is reused instead of piling up, and a lock
    keeps two live processes from writing the same file.

    Raises:
        UserError: the folder cannot be written, the disk is full, or another process is writing ``path``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial_path = path.with_name(path.name + PARTIAL_SUFFIX)
        with explained_write_errors(self.partial_path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = os.fdopen(self._open_locked(), "wb", buffering=1 << 20)

    def _open_locked(self) -> int:
        while True:
            descriptor = os.open(self.partial_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise UserError(
                    f"{self.path}: another process is writing it; wait for that one or choose another name"
                ) from None
            except OSError:
                pass  # a file system without locks: the name alone has to do
            # Its last owner may have renamed or removed the file between our open and our lock;
            # truncating then would destroy a finished file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.partial_path)):
                    os.ftruncate(descriptor, 0)
                    return descriptor
            os.close(descriptor)

    def write(self, data: bytes) -> None:
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

    def discard(self) -> None:
        """Removes the unfinished file; harmless after ``publish``."""
        if self._stream.closed:
            return
        # Removed before the lock goes, so that it cannot be another process's file by then.
        self.partial_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the last buffer may not fit a full disk
            self._stream.close()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` to ``path`` as indented JSON, whole or not at all."""
    file = PartialFile(path)
    try:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        file.finish()
        file.publish()
    finally:
        file.discard()
    fsync_folder(path.parent)
