"""At most one run writes a run folder: a lock on a file inside, held by the first process.

A lock is on a file, not on its name. Where somebody removes the file, the next run makes a new one and locks
that; the first one notices at its next look, and ends. Until then, for about a step, both write: leave the
file where it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import LASTING, patiently
from megatron_lpa.run_folder import LOCK, open_own, shown

logger = logging.getLogger(__name__)

WAIT_S = 120.0
"""For a lock that is taken. File servers keep that of a machine that was lost for about 90 s."""

WAIT_AFTER_REQUEUE_S = 600.0
"""The same when SLURM has started the job again: nobody else is meant to have the lock, and nobody sits and
waits."""

LOOK_EVERY_S = 1.0
"""After the lock, between two steps and while another run has it."""
_MOST_NAME_BYTES = 500
_MOST_STRANGE = 20
"""Times in a row that a file is another one at its name, before the file system is believed to tell no file
from another."""
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Lustre mounted without flock, NFS without lockd, and file systems that know no locks at all."""


class RunLock:
    """The lock of a run folder, and whether it still keeps others out. It goes with the process, however it
    ends.

    Args:
        folder: the run folder.
        file: the open lock file.
        locked: whether its file system knows locks.
        known: whether it knows one file from another: some give the same file another identity at each look.
    """

    def __init__(self, folder: Path, file: BinaryIO, locked: bool, known: bool = True) -> None:
        self._known = known
        self._made: Sequence[Path] = ()
        self._folder, self._path, self._file, self._locked = folder, folder / LOCK, file, locked
        self._folder_was = os.stat(folder)
        self._lost: UserError | None = None
        self.next_look_s = time.monotonic() + LOOK_EVERY_S
        """When ``lost`` is to be asked again, by the clock of ``time.monotonic``; at once where the folder is
        lost."""

    def lost(self) -> UserError | None:
        """Why nothing may be written any more; None while the folder is this run's.

        Where the lock file was removed, it is made and locked again, unless another run has come first. A
        disk that does not answer says nothing: the next look tells.

        Returns:
            TryAgain: another run has the folder. UserError: it is no longer there.
        """
        if self._lost is None:
            self.next_look_s = time.monotonic() + LOOK_EVERY_S
        if self._known and self._lost is None:
            try:
                self._lost = self._look()
            except UserError as error:
                self._lost = error
            except OSError:
                pass
            if self._lost is not None:
                self.next_look_s = 0.0
        return self._lost

    def still_held(self) -> bool:
        """Whether the folder is this run's, as ``lost`` finds."""
        return self.lost() is None

    def _look(self) -> UserError | None:
        if _is_at(self._file, self._path):
            return None
        if not _same(self._folder_was, lambda: os.stat(self._folder)):
            return UserError(
                f"{self._folder}: the run folder was moved or removed while the run was writing "
                f"it{self._where_now()}; nothing more is written. Bring it back under that name, or give its "
                "new one, and start again"
            )
        gone = not _is_there(self._path)
        file = open_own(self._path)
        try:
            taken = _taken(file) if self._locked else gone
            if taken and _is_at(file, self._path):
                file, self._file = self._file, file
                _sign(self._file)
                logger.warning(
                    f"{self._path}: was removed or replaced while the run was writing here; it is made "
                    "again. It keeps a second run out: leave it where it is"
                )
                return None
            if taken:  # replaced once more meanwhile
                return None
            holder = _holder(file)
        finally:
            file.close()
        return TryAgain(
            f"{self._folder}: another run has taken this folder over ({holder}), after {LOCK} was removed or "
            "replaced; this one writes nothing more"
        )

    def _where_now(self) -> str:
        """Where the folder is now, where the system tells."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._file.fileno()}"))
        except OSError:
            return ""
        return "" if path.name != LOCK else f" (it is {shown(path.parent)} now)"

    def leave(self) -> None:
        """Let others have the folder; it goes where this run has made it and put nothing into it."""
        if self._made and self.still_held():
            with contextlib.suppress(OSError):
                if os.listdir(self._folder) == [LOCK]:
                    os.unlink(self._path)
                    for path in self._made:
                        path.rmdir()
        self.close()

    def close(self) -> None:
        """Let others have the folder."""
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def lock_run(
    folder: Path, wait_s: float | None = None, most_s: float = math.inf, made: Sequence[Path] = ()
) -> RunLock:
    """Keep other runs out of ``folder``, waiting a while for one that may be about to end.

    Args:
        folder: the run folder.
        wait_s: seconds to wait for a lock that is taken; None for ``WAIT_S``, or ``WAIT_AFTER_REQUEUE_S``.
        most_s: seconds to wait, if less than that.
        made: folders that this run has made, the run folder first, each followed by the one that it is in.

    On a file system without locks it warns and goes on: two runs would not be noticed, but there would be
    none at all otherwise.

    Raises:
        UserError: the lock file is a link, or not a file that a run can write.
        TryAgain: another run still has it after that time, or the file cannot be made or locked.
    """
    path = folder / LOCK
    if wait_s is None:
        wait_s = WAIT_AFTER_REQUEUE_S if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else WAIT_S
    limit_s, since_s = min(wait_s, most_s), time.monotonic()
    told, strange = False, 0
    while True:
        file = _opened(path)
        try:
            lock, holder = _claim(folder, file, known=strange < _MOST_STRANGE)
        except OSError as error:
            file.close()
            if error.errno in LASTING or strange >= _MOST_STRANGE:
                raise _unwritable(folder, error) from error
            strange += 1
            time.sleep(LOOK_EVERY_S)
            continue
        except BaseException:
            file.close()
            raise
        if lock is not None:
            lock._made = made
            return lock
        file.close()
        if holder is None:
            strange += 1
            continue
        strange = 0
        if time.monotonic() - since_s >= limit_s:
            raise TryAgain(
                f"{folder}: another run is writing here ({holder}); choose another logging.name, or stop "
                "that run"
            )
        if not told:
            logger.info(
                f"note: {folder}: another run is writing here ({holder}). Waiting up to {limit_s:.0f} s for "
                "it to end; the lock of a machine that was lost takes a while to go. Ctrl-C gives up"
            )
            told = True
        time.sleep(min(LOOK_EVERY_S, limit_s))


def _claim(folder: Path, file: BinaryIO, known: bool) -> tuple[RunLock | None, str | None]:
    """The lock, or who has it; neither where the file is no longer the one of that name, which keeps nobody
    out."""
    path, locked = folder / LOCK, True
    try:
        if not _taken(file):
            return None, _holder(file)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise TryAgain(
                f"{path}: cannot be locked: {error}; see whether its file system is well"
            ) from error
        locked = False
    if known and not _is_at(file, path):
        return None, None
    if os.fstat(file.fileno()).st_nlink > 1:
        # A hard link: what its other name leads to stays as it is.
        os.unlink(path)
        return None, None
    if not locked:
        logger.warning(
            f"{path}: this file system has no locks, so two runs that write {folder} at a time would not be "
            "noticed"
        )
    _sign(file)
    return RunLock(folder, file, locked, known), None


def _opened(path: Path) -> BinaryIO:
    try:
        return patiently(lambda: open_own(path, other_names=True), path, "opened")
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    kind = UserError if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else TryAgain
    return kind(f"{folder}: cannot be written: {error}; choose another logging.run_dir")


def _taken(file: BinaryIO) -> bool:
    """Lock an open file, if nobody else has it locked.

    Raises:
        OSError: the file system has no locks, or fails.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        status = os.fstat(file.fileno())
    except OSError as error:
        if error.errno == errno.ESTALE:  # removed on another machine
            return False
        raise
    return _same(status, lambda: os.lstat(path))


def _is_there(path: Path) -> bool:
    """Whether anything has that name, be it a link to nothing. An error of the disk is none of both."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _same(status: os.stat_result, look: Callable[[], os.stat_result]) -> bool:
    try:
        return os.path.samestat(status, look())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _sign(file: BinaryIO) -> None:
    """Say in the lock file who has it; a full disk leaves it empty."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write((_myself() + "\n").encode())


def _holder(file: BinaryIO) -> str:
    """Who has it, as the file says; it may come from a stranger."""
    with contextlib.suppress(OSError):
        file.seek(0)
        name = file.read(_MOST_NAME_BYTES).partition(b"\n")[0].decode(errors="replace").strip()
        if name:
            return name if name.isprintable() else repr(name)
    return "unknown"


def _myself() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else "")
