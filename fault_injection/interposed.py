"""What a process asks of its disk, with errors in place of answers and places at which to stand still.

``os.open``, ``open``, ``os.fdopen`` and ``os.pread`` are wrapped; the wrapped ones do the work. Which
functions of the run call them does not matter, so that nothing here has to follow how it is written.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from megatron_lpa.run_folder import MANIFEST, STEP

Tell = Callable[..., None]
Reach = Callable[[str, int], None]

_open, _os_open, _fdopen, _pread = builtins.open, os.open, os.fdopen, os.pread

_WRITTEN = re.compile(rf"/\.{STEP}(\d{{8,}})\.partial/(state/|weights/|\.?{re.escape(MANIFEST)})")


class Disk:
    """The wrappers, and what they do.

    Args:
        errors: each with the number of a fault (``id``), a pattern of paths (``path``), the first matching
            open or read that fails (``nth``), how many do (``times``; 0: all from then on) and with what
            (``error``). With ``once``, a path, the first process to make that file has the fault, and others
            have none. With ``hold`` in place of ``error`` the process stands still there.
        full: steps from and to which nothing can be written into checkpoints.
        tell: sends an event.
        reach: stands still at a place, if told to.
        holds: whether it is told to stand still somewhere at this step or later.
    """

    def __init__(
        self,
        errors: list[dict[str, Any]],
        full: tuple[int, int],
        tell: Tell,
        reach: Reach,
        holds: Callable[[str, int], bool],
    ) -> None:
        self._errors = [{**error, "seen": 0, "given": 0} for error in errors]
        self._full, self._tell, self._reach, self._holds = full, tell, reach, holds
        self._short: re.Pattern[str] | None = None

    def wrap(self) -> None:
        """Put the wrappers into place."""
        os.open, os.fdopen, os.pread = self._os_open, self._fdopen, self._pread  # type: ignore[assignment]
        builtins.open = io.open = self._open

    @contextlib.contextmanager
    def cut_short(self, pattern: str) -> Iterator[None]:
        """Files of this pattern end before their first byte for whoever uses ``os.pread``."""
        self._short = re.compile(pattern)
        try:
            yield
        finally:
            self._short = None

    # The wrapped functions

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if not flags & os.O_DIRECTORY:
            self._before(path, bool(writes))
        return _os_open(path, flags, mode, dir_fd=dir_fd)

    def _open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        writes = bool(set(mode) & set("wax+"))
        if not isinstance(file, int):
            self._before(file, writes)
        opened = _open(file, mode, *arguments, **options)
        return self._held(opened, file) if writes else opened

    def _fdopen(self, descriptor: int, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = _fdopen(descriptor, mode, *arguments, **options)
        return self._held(opened, _path_of(descriptor)) if set(mode) & set("wax+") else opened

    def _pread(self, descriptor: int, length: int, offset: int) -> bytes:
        if self._short is not None or self._errors:
            path = _path_of(descriptor)
            if self._short is not None and self._short.search(path):
                return b""
            self._fail(path)
        return _pread(descriptor, length, offset)

    # What they do

    def _before(self, path: Any, writes: bool) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.fsdecode(path)
        if not writes:
            if self._errors and os.path.exists(name):
                self._fail(os.path.abspath(name))
            return
        if found := _WRITTEN.search(name):
            step, part = int(found[1]), found[2]
            if part == "state/":
                self._reach("before-state", step)
            elif part.endswith(MANIFEST):
                self._reach("manifest", step)
            if part == "state/" and self._full[0] <= step <= self._full[1]:
                self._tell(event="full", step=step)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    def _fail(self, path: str) -> None:
        for rule in self._errors:
            if not re.search(rule["path"], path):
                continue
            rule["seen"] += 1
            if rule["seen"] < rule["nth"] or (rule["times"] and rule["given"] >= rule["times"]):
                continue
            if not rule["given"] and rule.get("once") and not _claimed(rule["once"]):
                rule["nth"] = 1 << 60
                continue
            rule["given"] += 1
            if rule.get("hold"):
                self._reach("disk", 0)
                continue
            if rule["given"] == 1:
                self._tell(event="open-error", id=rule["id"], path=path)
            number = getattr(errno, rule["error"])
            raise OSError(number, os.strerror(number), path)

    def _held(self, file: Any, path: Any) -> Any:
        found = _WRITTEN.search(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else None
        if found is None:
            return file
        step, part = int(found[1]), found[2]
        if part.endswith(MANIFEST):
            held = self._holds("manifest-torn", step)
            return _HeldFile(file, 1, lambda: self._reach("manifest-torn", step)) if held else file
        # In the third write: behind the header, inside a tensor.
        place = "state-torn" if part == "state/" else "weights-torn"
        return _HeldFile(file, 3, lambda: self._reach(place, step))


class _HeldFile:
    """A file that stands still in the middle of a write.

    Args:
        file: that does the work.
        write: in which, from 1.
        reach: stands still.
    """

    def __init__(self, file: Any, write: int, reach: Callable[[], None]) -> None:
        self._file, self._at, self._reach, self._writes = file, write, reach, 0

    def write(self, data: Any) -> int:
        self._writes += 1
        if self._writes == self._at:
            half = len(data) // 2
            self._file.write(data[:half])
            self._file.flush()
            self._reach()
            return half + int(self._file.write(data[half:]))
        return int(self._file.write(data))

    def __enter__(self) -> _HeldFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def _claimed(path: str) -> bool:
    """Whether this process is the first to make that file."""
    try:
        os.close(_os_open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True
