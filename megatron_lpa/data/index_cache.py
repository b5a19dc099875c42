"""Sample indices on disk: made once, then mapped by every process of a node, which share the pages.

A file holds a header and the starts of ``packing.py``. Its name carries a hash of everything that its content
follows from, so a file is never out of date: other data or settings have another name. It is written beside
its name and renamed when whole, and a checksum over all of it finds what a disk or another program did.

Whoever finds no file makes it. A lock lets one process of those that share the folder do so while the others
look for the file again and again, up to a limit of time. The lock only spares work: it goes with its process,
and where a file system has none, several processes make the same file, each under a name of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from megatron_lpa.data.storage.partial_file import PARTIAL_SUFFIX, explained_write_errors
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import (
    LASTING,
    UnusableFile,
    exists,
    is_dir,
    names_in,
    new_file,
    open_regular,
    patiently,
)

FORMAT = 1  # of the file and of what it holds: another document order or another packing is another format
Report = Callable[[str], None]

_MAGIC = b"LPAINDEX"
_HEADER = struct.Struct("<8sII32sQQ")  # magic, format, CRC-32 of the rest and the rows, key, tokens, rows
_POLL_S = 0.05
_QUIET_WAIT_S = 2.0
_QUIET_WORK_S = 1.0


@dataclass(frozen=True)
class SampleIndex:
    """What ``packing.sample_starts`` returned.

    Args:
        starts: uint32 ``(samples + 1, 2)``, or ``(0, 2)``; read-only.
        num_tokens: of the stream.
    """

    starts: np.ndarray
    num_tokens: int


@dataclass(frozen=True)
class IndexCache:
    """Where indices are kept.

    Args:
        folders: places to look in, best first; a new file goes to the first that can be written.
        timeout_s: how long to wait for a file that another process makes.
        report: takes a sentence about something that takes its time.
    """

    folders: Sequence[Path]
    timeout_s: float
    report: Report

    def get(self, name: str, key: str, make: Callable[[], SampleIndex]) -> SampleIndex:
        """The index kept under ``key``, made now if there is none.

        Args:
            name: what to call the file, besides its key.
            key: everything that the index follows from, in any form.
            make: makes it.

        Raises:
            UserError: no folder may be written.
            TryAgain: the disk is full or does not answer, or the wait for another process was too long.
        """
        digest = hashlib.sha256(f"{FORMAT} {key}".encode()).digest()
        file_name = f"{name}-{digest.hex()[:16]}.index"
        started, told = time.monotonic(), False
        while True:
            for folder in self.folders:
                if (found := _read(folder / file_name, digest)) is not None:
                    return found
            path = self._folder_to_write() / file_name
            with _claimed(path.with_suffix(".lock")) as claimed:
                if claimed:
                    return self._read_or_make(path, digest, make)
            waited_s = time.monotonic() - started
            if waited_s >= self.timeout_s:
                raise TryAgain(
                    f"{path}: not there after {self.timeout_s:g} s, and another process, which holds the "
                    "lock beside it, is still making it; raise data.index_timeout_s and "
                    "train.start_timeout_s if it only needs more time, else end it, or set data.cache_dir "
                    "to a folder of this machine"
                )
            if waited_s >= _QUIET_WAIT_S and not told:
                told = True
                self.report(
                    f"waiting for {path}, which another process is making, for {self.timeout_s:g} s at most "
                    "(data.index_timeout_s)"
                )
            time.sleep(_POLL_S)

    def _read_or_make(self, path: Path, digest: bytes, make: Callable[[], SampleIndex]) -> SampleIndex:
        found = _read(path, digest)  # another process may have finished it between our look and our lock
        if found is not None:
            return found
        if exists(path):
            self.report(f"{path}: damaged, or not a sample index; it is made again")
        for name in names_in(path.parent):
            if name.startswith(f"{path.name}.") and name.endswith(PARTIAL_SUFFIX):
                _remove_if_abandoned(path.parent / name)
        started = time.monotonic()
        _write(path, digest, make())
        found = _read(path, digest)
        if found is None:
            raise TryAgain(
                f"{path}: reads back other than it was written; check the disk, or set data.cache_dir to a "
                "folder on another one"
            )
        if time.monotonic() - started > _QUIET_WORK_S:
            self.report(f"{path}: made in {time.monotonic() - started:.1f} s; later starts only read it")
        return found

    def _folder_to_write(self) -> Path:
        problems, may_pass = [], False
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problems.append(f"{folder} ({error.strerror})")
                may_pass |= error.errno not in (*LASTING, errno.EEXIST)
                continue
            except ValueError as error:  # a NUL character
                problems.append(f"{str(folder)!r} ({error})")
                continue
            if is_dir(folder) and os.access(folder, os.W_OK | os.X_OK):
                return folder
            problems.append(f"{folder} (not writable)")
        raise (TryAgain if may_pass else UserError)(
            f"no folder for the sample index: {', '.join(problems)}; set data.cache_dir to one that can be "
            "written"
        )


def default_folders(prefix: str) -> list[Path]:
    """Beside the dataset; where that cannot be written, in the user's cache, if the user has one."""
    beside = Path(f"{prefix}.cache")
    try:
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry for this user, as in some containers
        return [beside]
    return [beside, user_cache / "megatron_lpa"]


def _read(path: Path, digest: bytes) -> SampleIndex | None:
    """The index at ``path``; None where there is none, it may not be read, or it is anything else.

    Raises:
        TryAgain: the disk does not give it.
    """
    try:
        return patiently(lambda: _read_once(path, digest), path)
    except (OSError, UnusableFile):
        return None
    except TryAgain as error:
        raise TryAgain(f"{error}; an index can be removed too, and is made again then") from error


def _read_once(path: Path, digest: bytes) -> SampleIndex | None:
    with io.BufferedReader(cast(io.RawIOBase, open_regular(path))) as stream:
        header = stream.read(_HEADER.size)
        size_bytes = os.fstat(stream.fileno()).st_size
        if len(header) < _HEADER.size:
            return None
        magic, version, checksum, found_digest, num_tokens, num_rows = _HEADER.unpack(header)
        if (magic, version, found_digest) != (_MAGIC, FORMAT, digest):
            return None
        if size_bytes != _HEADER.size + 8 * num_rows:
            return None
        if num_rows:
            mapped = np.memmap(stream, dtype="<u4", mode="r", offset=_HEADER.size, shape=(num_rows, 2))
            starts = np.asarray(mapped)
        else:
            starts = np.empty((0, 2), dtype="<u4")
    index = SampleIndex(starts, num_tokens)
    return index if _checksum(index, digest) == checksum else None


def _write(path: Path, digest: bytes, index: SampleIndex) -> None:
    # A name of this process's own: on a file system without locks another node may be writing the same file.
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL_SUFFIX}")
    counts = (index.num_tokens, len(index.starts))
    header = _HEADER.pack(_MAGIC, FORMAT, _checksum(index, digest), digest, *counts)
    try:
        with explained_write_errors(path):
            # Not synchronised with the disk, unlike what cannot be made again: the checksum finds what a
            # power cut leaves.
            with new_file(partial, durable=False) as stream:
                with contextlib.suppress(OSError):
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells that this process lives
                stream.write(header)
                stream.write(np.ascontiguousarray(index.starts, dtype="<u4").data)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _checksum(index: SampleIndex, digest: bytes) -> int:
    checksum = zlib.crc32(digest + struct.pack("<QQ", index.num_tokens, len(index.starts)))
    return zlib.crc32(np.ascontiguousarray(index.starts, dtype="<u4").data, checksum)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process may do the work that the lock file ``path`` stands for; the lock goes with it."""
    descriptor = _open_lock(path)
    try:
        claimed = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claimed = False
        except OSError:
            pass  # a file system without locks: everybody makes the file
        try:
            yield claimed
        finally:
            if claimed:  # who opened this file before it went looks for the index again before making it
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with explained_write_errors(path):
        try:
            return patiently(lambda: os.open(path, flags, 0o666), path)
        except TryAgain as error:  # in the words for writing
            raise error.__cause__ or error from None


def _remove_if_abandoned(path: Path) -> None:
    """Removes what a killed process left; a living one holds a lock on its unfinished file."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
