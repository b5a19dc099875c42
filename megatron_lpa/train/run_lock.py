"""At most one run writes a run folder: a lock on a file inside, held by the first process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from megatron_lpa.errors import TryAgain, UserError

WAIT_S = 120.0
"""For a lock that is taken. File servers keep that of a machine that was lost for about 90 s."""

WAIT_AFTER_REQUEUE_S = 600.0
"""The same when SLURM has started the job again: nobody else is meant to have the lock, and nobody sits and waits."""

WAIT_VARIABLE = "RUN_LOCK_WAIT_S"
_LOOK_EVERY_S = 1.0
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Lustre mounted without flock, NFS without lockd, and file systems that know no locks at all."""


def lock_run(folder: Path) -> IO[str]:
    """Keep other runs out of ``folder``, waiting a while for one that may be about to end.

    On a file system without locks it warns and goes on: two runs would not be noticed, but there would be none at all
    otherwise.

    Returns:
        The open file. The lock goes with the process, however it ends.

    Raises:
        TryAgain: another run still has it after ``wait_s()`` seconds, or the file cannot be made or locked.
    """
    path = folder / ".lock"
    try:
        lock = open(path, "a+")  # noqa: SIM115 - stays open as long as the run
    except OSError as error:
        raise TryAgain(f"{folder}: cannot be written: {error}; choose another logging.run_dir") from error
    try:
        _take(lock, folder)
    except BaseException:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(_myself() + "\n")
    lock.flush()
    return lock


def _take(lock: IO[str], folder: Path) -> None:
    limit_s, since_s = wait_s(), time.monotonic()
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise TryAgain(
                    f"{lock.name}: cannot be locked: {error}; see whether its file system is well"
                ) from error
            print(
                f"warning: {lock.name}: this file system has no locks ({error.strerror}), so two runs that write {folder} "
                "at a time would not be noticed",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            return
        lock.seek(0)
        holder = lock.readline().strip() or "unknown"
        if time.monotonic() - since_s >= limit_s:
            raise TryAgain(
                f"{folder}: another run is writing here ({holder}); choose another logging.name, or stop that run"
            )
        if not told:
            print(
                f"note: {folder}: another run is writing here ({holder}). Waiting up to {limit_s:.0f} s for it to end; "
                "the lock of a machine that was lost takes a while to go. Ctrl-C gives up",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            told = True
        time.sleep(min(_LOOK_EVERY_S, limit_s))


def wait_s() -> float:
    """Seconds to wait for a lock that is taken; ``RUN_LOCK_WAIT_S`` where the environment has it.

    Raises:
        UserError: the variable is no number of seconds.
    """
    if (asked := os.environ.get(WAIT_VARIABLE)) is not None:
        try:
            return max(0.0, float(asked))
        except ValueError:
            raise UserError(f"{WAIT_VARIABLE} is {asked!r}; it is a number of seconds") from None
    return WAIT_AFTER_REQUEUE_S if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else WAIT_S


def _myself() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else "")
