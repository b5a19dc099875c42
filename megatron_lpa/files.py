"""Reading from disks that hiccup, and writing files that appear whole: the one place for both.

Files may lie on a network disk and come from a stranger. A disk that does not answer is asked again, only
regular files of a sensible length are read, what is written is on disk before it has its name, and no link is
followed.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from megatron_lpa.errors import TryAgain, UserError

Result = TypeVar("Result")

PAUSES_S = (0.2, 1.0, 3.0)
"""Before a file that the disk did not give is asked for again."""

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
LASTING = (*_ABSENT, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
"""What a file system says of names and permissions, for good. The rest may be gone at the next attempt."""

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""What file systems say that cannot bring a folder's names to disk."""

MOST_TEXT_BYTES = 64 << 20
"""Of a configuration, an index or a manifest: far more than any needs."""


_READ_BYTES = 1 << 22


class UnusableFile(UserError):
    """A file that is not of the kind that was asked for: a device, too long, not JSON."""


def patiently(read: Callable[[], Result], path: str | os.PathLike[str], done: str = "read") -> Result:
    """What ``read`` gives, with further attempts where the disk does not answer. That is no damage.

    Args:
        read: opens and reads ``path``, anew at each attempt.
        path: for the message.
        done: what is done with it, for the message.

    Raises:
        OSError: one of ``LASTING``, at once.
        TryAgain: no attempt succeeded; the message names the file and what the disk said.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return read()
        except OSError as error:
            if error.errno in LASTING:
                raise
            if pause_s is None:
                raise TryAgain(
                    f"{path}: cannot be {done} ({error.strerror or error}), at {len(PAUSES_S) + 1} attempts; "
                    "this need not mean damage: start again when the disk answers"
                ) from error
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def from_disk(read: Callable[[], Result], path: str | os.PathLike[str]) -> Result:
    """What ``read`` gives, see :func:`patiently`.

    Raises:
        UserError: the file system says for good that it cannot be read.
        TryAgain: no attempt succeeded.
    """
    try:
        return patiently(read, path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str | os.PathLike[str], error: OSError) -> UserError:
    """What to raise of an error in reading ``path``: :class:`TryAgain` where it may pass."""
    kind = UserError if error.errno in LASTING else TryAgain
    return kind(
        f"{error.filename or path}: cannot be read ({error.strerror or error}); check the path and its "
        "permissions"
    )


def status(path: str | os.PathLike[str], follow_links: bool = True) -> os.stat_result | None:
    """What the file system says of a file; None where there is none, as where a link leads to nothing.

    Not ``Path.is_file`` and its like: some versions of Python take any error of the disk for "no such file".

    Args:
        path: the file.
        follow_links: else it is a link's own status.

    Raises:
        UserError: it may not be looked at, or no file can be called so.
        TryAgain: the disk does not answer.
    """

    def look() -> os.stat_result | None:
        try:
            return os.stat(path) if follow_links else os.lstat(path)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise

    try:
        return from_disk(look, path)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{os.fspath(path)!r}: no file can be called so ({error})") from None


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything called so. Raises as :func:`status`."""
    return status(path) is not None


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether it is a regular file. Raises as :func:`status`."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_dir(path: str | os.PathLike[str]) -> bool:
    """Whether it is a folder. Raises as :func:`status`."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_link(path: str | os.PathLike[str]) -> bool:
    """Whether it is a symbolic link, wherever that leads. Raises as :func:`status`."""
    found = status(path, follow_links=False)
    return found is not None and stat.S_ISLNK(found.st_mode)


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """What a folder holds, in order; nothing where it is no folder.

    ``glob`` is not used: it takes any error of the disk for an empty folder, or ends at the first one.

    Raises:
        UserError: it may not be read.
        TryAgain: the disk does not answer.
    """

    def look() -> list[str]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entry.name for entry in entries)
        except OSError as error:
            if error.errno in _ABSENT:
                return []
            raise

    return from_disk(look, folder)


def files_below(folder: str | os.PathLike[str], patterns: Sequence[str] = ("*",)) -> list[Path]:
    """Regular files whose names any of ``patterns`` fits, in sub-folders too, in order; no links to folders.

    Raises:
        UserError, TryAgain: as :func:`names_in`.
    """
    found: list[Path] = []
    for path in (Path(folder) / name for name in names_in(folder)):
        if is_dir(path) and not is_link(path):
            found += files_below(path, patterns)
        elif any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns) and is_file(path):
            found.append(path)
    return found


def refuse_link(path: str | os.PathLike[str], why: str) -> None:
    """Nothing behind a link is read or changed: that may be somebody else's. What is not there is none.

    Args:
        path: what must not be a link.
        why: the rest of the message, after "a link".

    Raises:
        UnusableFile: it is one.
        UserError, TryAgain: as :func:`status`.
    """
    if is_link(path):
        raise UnusableFile(f"{path}: a link, {why}")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, unbuffered. One attempt; a link is followed.

    A pipe is not waited for, and a device not read.

    Raises:
        UnusableFile: it is a folder, a pipe, a socket or a device.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        half = isinstance(error, UnicodeError)
        raise UnusableFile(
            f"{os.fspath(path)!r}: no file can be called so: the name holds "
            + ("half a surrogate pair" if half else "a NUL character")
        ) from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # sockets, and devices without a driver
            with contextlib.suppress(OSError):
                mode = os.stat(path).st_mode
                if not stat.S_ISREG(mode):
                    raise UnusableFile(_not_regular(path, mode)) from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise UnusableFile(_not_regular(path, mode))
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise


def _not_regular(path: str | os.PathLike[str], mode: int) -> str:
    return f"{path}: {kind_of(mode)}, not a regular file; give a file that holds what it should"


def kind_of(mode: int) -> str:
    """What a file is, from its ``st_mode``, in words."""
    for test, words in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a link"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return words
    return "a regular file" if stat.S_ISREG(mode) else "a device"


def read_bytes(path: str | os.PathLike[str], most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """All of a regular file.

    Raises:
        UnusableFile: not a regular file, or longer than ``most_bytes``.
        OSError: one of ``LASTING``.
        TryAgain: the disk does not give it.
    """

    def read() -> bytes:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= most_bytes:
                content = bytearray()
                # In blocks: a read takes memory for all that it is asked for.
                while len(content) <= most_bytes and (
                    block := file.read(min(_READ_BYTES, most_bytes + 1 - len(content)))
                ):
                    content += block
                if len(content) <= most_bytes:
                    return bytes(content)
                size = len(content)
        raise UnusableFile(f"{path}: {size:,} bytes, more than the {most_bytes:,} that such a file can have")

    return patiently(read, path)


def read_text(path: str | os.PathLike[str], most_bytes: int = MOST_TEXT_BYTES) -> str:
    """All of a regular file of UTF-8 text.

    Raises:
        UnusableFile: as ``read_bytes``, or not UTF-8.
        OSError, TryAgain: as ``read_bytes``.
    """
    content = read_bytes(path, most_bytes)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnusableFile(f"{path}, line {line}: not UTF-8 text (byte {error.start})") from error


def read_json(
    path: str | os.PathLike[str], most_bytes: int = MOST_TEXT_BYTES, parse: Callable[[str], Any] = json.loads
) -> Any:
    """What a file of JSON holds, by a ``parse`` that raises what ``json.loads`` raises.

    Raises:
        UnusableFile: as ``read_text``, or not JSON: cut short, nested too deeply, a number too long.
        OSError, TryAgain: as ``read_bytes``.
    """
    text = read_text(path, most_bytes)
    try:
        return parse(text)
    except json.JSONDecodeError as error:
        raise UnusableFile(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise UnusableFile(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:  # more digits than Python turns into a number
        raise UnusableFile(f"{path}: not valid JSON: {str(error)[:200]}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """Hash of a regular file's contents, in hex. One attempt.

    Raises:
        UnusableFile: not a regular file.
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def tree_digest(folder: str | os.PathLike[str], paths: Iterable[Path]) -> str:
    """One hash of the contents of files, and of their names inside ``folder``.

    Raises:
        OSError, UserError, TryAgain: as ``read_bytes``.
    """
    digest = hashlib.sha256()
    for path in paths:
        content = read_bytes(path)
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Make names inside ``folder`` survive a power cut, where its file system can: some refuse to be asked.

    Raises:
        OSError: the disk failed.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], durable: bool = True) -> Iterator[BinaryIO]:
    """A file that did not exist, open for writing and, if ``durable``, brought to disk at the end.

    What has the name goes first: a link is not followed, a file with another name (a hard link) keeps its
    contents there. Permissions are those that the umask gives.

    Raises:
        OSError: it cannot be made, written or brought to disk, or the name is a folder's.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a small file that appears whole or not at all, and is on disk. Its folder must exist.

    It is written as ``.NAME.partial`` beside it; what a killed process leaves has that one name, and the next
    write takes it over. One process at a time may write a file.

    Raises:
        OSError: nothing has changed then, or the name could not be brought to disk.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with new_file(partial) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
