"""PyTorch's locks around compiled extensions, which a killed process leaves behind for good.

DeepSpeed compiles small operators at their first use, and takes the lock again whenever it loads one. PyTorch
lets one process in and makes the others wait until a file named ``lock`` is gone, without a limit and without
a word. The process that is in keeps the file open, so on one machine it can be told whether there is any.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import LASTING, patiently

logger = logging.getLogger(__name__)

STALE_S = 600.0
"""No operator takes that long to compile, so nobody holds a lock of this age."""

UNHELD_STALE_S = 60.0
"""For a lock on a disk of this machine that no process here has open. Not at once, because a process in
another container would not be seen."""

_QUIET_S = 30.0
_POLL_S = 0.5
_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "gluster",
    "fuse",
    "9p",
    "afs",
    "panfs",
    "weka",
)


def wait_for_compilers(
    root: Path | None = None, stale_s: float = STALE_S, unheld_stale_s: float = UNHELD_STALE_S
) -> None:
    """Waits until no extension is being compiled or loaded; removes locks that were left over.

    Args:
        root: folder of compiled extensions; by default ``TORCH_EXTENSIONS_DIR``, or where PyTorch puts them.
        stale_s: age from which on any lock is left over.
        unheld_stale_s: age from which on a lock is that nobody here holds and nobody elsewhere can.

    Raises:
        UserError: such a lock cannot be removed.
        TryAgain: the disk does not answer.
    """
    folder = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    told: set[Path] = set()
    ages = _Ages()
    while locks := _locks(folder):
        for lock, status in locks.items():
            age_s = ages.of(lock, status)
            unheld = _nobody_holds(lock)
            left_s = (unheld_stale_s if unheld else stale_s) - age_s
            if left_s <= 0:
                try:
                    lock.unlink(missing_ok=True)
                except OSError as error:
                    raise _unremovable(lock, error) from error
                _tell(f"{lock}: removed; a process that was killed had left it")
            elif (unheld or age_s >= _QUIET_S) and lock not in told:
                told.add(lock)
                why = (
                    "left by a process that was killed"
                    if unheld
                    else "waiting for another process to compile this"
                )
                _tell(
                    f"{lock}: {why}; in {left_s:.0f} s this run removes it (sooner: delete it, if no other "
                    "run starts)"
                )
        time.sleep(_POLL_S)


def _unremovable(lock: Path, error: OSError) -> UserError:
    kind = UserError if error.errno in LASTING else TryAgain
    return kind(
        f"{lock}: a process that was killed has left it, and it cannot be removed ({error.strerror}); remove "
        "it, or set TORCH_EXTENSIONS_DIR to a folder of your own"
    )


def _locks(folder: Path) -> dict[Path, os.stat_result]:
    """Every lock. PyTorch's folders lie one or two levels down."""
    above = [folder / name for name in _names(folder)]
    above += [path / name for path in above for name in _names(path)]
    found = {}
    for path in above:
        with contextlib.suppress(PermissionError):  # another user's, who compiles in it alone
            lock = path / "lock"
            if (seen := patiently(functools.partial(_seen, lock), lock)) is not None:
                found[lock] = seen
    return found


def _names(folder: Path) -> list[str]:
    """What is in it; nothing where it is no folder, has gone, or is another user's."""
    try:
        return patiently(functools.partial(os.listdir, folder), folder)
    except OSError:
        return []


def _seen(lock: Path) -> os.stat_result | None:
    try:
        return lock.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


class _Ages:
    """How old locks are, whatever clocks say.

    A date is compared once, when a lock is first seen, with what the same file system gives as the present: a
    file server has a clock of its own. From then on this process counts. A date in the future is as good as
    none.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[Path, int, int], tuple[float, float]] = {}

    def of(self, lock: Path, status: os.stat_result) -> float:
        """Age in seconds; from 0 again where another process has taken the lock since."""
        key = (lock, status.st_ino, status.st_mtime_ns)
        if key not in self._seen:
            age_s = max(0.0, _present(lock.parent) - status.st_mtime)
            self._seen[key] = (age_s, time.monotonic())
        age_s, since_s = self._seen[key]
        return age_s + time.monotonic() - since_s


def _present(folder: Path) -> float:
    """What a file gets as its date that is written in ``folder`` now."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
            probe.flush()
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()


def _nobody_holds(lock: Path) -> bool:
    """Whether it is sure that no process has ``lock`` open; false where that cannot be told."""
    try:
        if lock.stat().st_uid != os.getuid() or _is_shared(lock):
            return False  # others' files are not to be seen, and other machines' processes neither
        target = os.path.realpath(lock)
        for process in Path("/proc").glob("[0-9]*/fd"):
            with contextlib.suppress(OSError):  # another user's, or gone
                if any(os.readlink(file) == target for file in process.iterdir()):
                    return False
    except OSError:
        return False
    return Path("/proc/self/fd").exists()


def _is_shared(path: Path) -> bool:
    """Whether the file system can be one of several machines, by Linux's list of mounts; true where there is
    none."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return True
    target = os.path.realpath(path)
    above = [
        (len(point), kind)
        for _, point, kind, *_ in mounts
        if target == point or target.startswith(point.rstrip("/") + "/")
    ]
    return not above or max(above)[1].startswith(_NETWORK)


def _tell(text: str) -> None:
    logger.info(f"note: {text}")
