"""The sink that is the record of a run. Its views have modules of their own: the console, TensorBoard,
W&B."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from megatron_lpa.errors import UserError
from megatron_lpa.files import LASTING, patiently
from megatron_lpa.record_values import encoded
from megatron_lpa.records import Kept, Record, Steps, keep_records, write_again
from megatron_lpa.run_folder import DAMAGED_METRICS, METRICS, open_own
from megatron_lpa.train.callbacks.callback import Sink
from megatron_lpa.train.run_lock import RunLock
from megatron_lpa.train.state import Run

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Records that wait in memory for a disk that is full: a few megabytes."""


class MetricsFile(Sink):
    """``metrics.jsonl`` in the run folder: the record of a run, one JSON object per line.

    Records that cannot be written wait in memory, and are tried again with each one that follows: a disk that
    is full for a while ends no run and leaves no gap. A file that somebody removes, replaces or cuts
    meanwhile is made whole again as far as it can be, and says itself what is missing. One that gets a second
    name is written anew under the
    first: a copy made with ``cp -al`` keeps what it has.
    """

    required = True

    def __init__(self) -> None:
        self._path = Path(METRICS)
        self._lock: RunLock | None = None
        self._file: BinaryIO | None = None
        self._whole_bytes = 0
        self._torn = False
        # Some file systems give the same file another identity at each look.
        self._known = True
        self._last_step: float = 0
        self._steps = Steps()
        self._waiting: list[Record] = []
        self._warned = False
        self._rewind_to: int | None = None

    def open(self, run: Run) -> None:
        """Continue the file from the step the run resumes at: what is going to be repeated goes.

        Raises:
            UserError: the file may not be read or written, or is none.
            TryAgain: the disk does not give it.
            OSError: it cannot be written.
        """
        self._path, self._lock = run.folder / METRICS, run.lock
        self._last_step = step = run.progress.step
        try:
            kept = self._keep(lambda record: record["step"] <= step)
        except OSError as error:
            if error.errno in LASTING:
                raise UserError(
                    f"{self._path}: cannot be opened ({error.strerror}); see to its permissions"
                ) from error
            raise
        self._last_step = max(kept.last_step, 0)

    def _keep(self, wanted: Callable[[Record], bool]) -> Kept:
        """Write the file anew with the records that are wanted, and open that one."""
        kept = keep_records(self._path, wanted, DAMAGED_METRICS)
        self._steps = kept.steps
        if kept.damage:
            self._note(kept.damage)
        if kept.not_on_disk:
            _say(f"{self._path} is complete, but its folder could not be brought to disk: {kept.not_on_disk}")
        patiently(self._open_anew, self._path, "opened")
        return kept

    def _open_anew(self) -> None:
        # A copy may be made of hard links at any instant; that is looked at before each line.
        file = open_own(self._path, other_names=True)
        if self._file is not None:
            self._file.close()
        self._file, self._torn = file, False
        self._whole_bytes = os.fstat(file.fileno()).st_size
        self._known = self._look()[1]

    def _note(self, message: str) -> None:
        """Say it, and record it before what waits."""
        _say(message)
        event = {"kind": "event", "step": self._last_step, "message": message, "time": time.time()}
        self._waiting.insert(0, event)

    def has_record(self, kind: str, step: int) -> bool:
        """Whether the file has it, or it waits for the disk."""
        waiting = any(record["kind"] == kind and record["step"] == step for record in self._waiting)
        return waiting or self._steps.has(kind, step)

    def write(self, record: Record) -> None:
        """Append one line, after those that wait.

        Raises:
            UserError: the run folder is no longer this run's.
            OSError: as ``flush``, once too many wait.
        """
        self._waiting.append(record)
        try:
            self.flush()
        except OSError as error:
            if len(self._waiting) > MOST_WAITING:
                raise
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _say(f"metrics cannot be written, and wait in memory: {self._path}: {error}")
        self._warned = True

    def flush(self) -> None:
        """Append what waits.

        Raises:
            UserError: the run folder is no longer this run's; nothing is written.
            OSError: a line cannot be written; no part of it stays in the file.
        """
        if self._lock is not None and (lost := self._lock.lost()) is not None:
            raise lost
        self._find_again()
        if self._rewind_to is not None:
            step = self._rewind_to
            self._keep(lambda record: record["step"] <= step or record["kind"] == "event")
            self._rewind_to, self._last_step = None, min(self._last_step, step)
        while self._waiting:
            self._append(self._waiting[0])
            del self._waiting[0]
        self._warned = False

    def _append(self, record: Record) -> None:
        assert self._file is not None
        line = encoded(record) + b"\n"
        self._torn = True
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):  # else before the next line
                self._cut()
            raise
        self._torn = False
        self._whole_bytes += len(line)
        self._last_step = record["step"]
        self._steps.add(record)

    def _cut(self) -> None:
        """Take back what was written of a line."""
        assert self._file is not None
        self._file.truncate(self._whole_bytes)
        self._torn = False

    def _find_again(self) -> None:
        """Go on with the right file where somebody has removed, replaced or changed it.

        Raises:
            OSError: it cannot be written anew; nothing has changed then.
        """
        assert self._file is not None
        own_bytes, is_there, names = self._look()
        if self._torn and own_bytes > self._whole_bytes:
            if names < 2:
                self._cut()
            own_bytes = self._whole_bytes
        is_there = is_there or (not self._known and own_bytes >= 0 and _is_regular(self._path))
        happened = ""
        if is_there and own_bytes == self._whole_bytes:
            if names < 2:
                return
        elif is_there:
            happened = f"was changed by somebody else, from {self._whole_bytes:,} to {own_bytes:,} bytes"
        elif _is_regular(self._path):
            happened = "was replaced by somebody else"
        else:
            happened = "was removed"
            if self._bring_back():
                self._note(f"{self._path} {happened}, and is written again with all its records")
                return
        before = self._steps
        self._keep(lambda record: True)
        if missing := before.missing_in(self._steps):
            happened = f"{happened or 'was changed by somebody else'}; {missing} are missing"
        if happened:
            self._note(f"{self._path} {happened}")

    def _look(self) -> tuple[int, bool, int]:
        """Of the open file: its bytes, -1 where it cannot be read any more; whether it has its name; how many
        it has."""
        assert self._file is not None
        try:
            own = os.fstat(self._file.fileno())
        except OSError as error:
            if error.errno != errno.ESTALE:  # removed on another machine
                raise
            return -1, False, 0
        try:
            return own.st_size, os.path.samestat(own, os.lstat(self._path)), own.st_nlink
        except FileNotFoundError:
            return own.st_size, False, own.st_nlink

    def _bring_back(self) -> bool:
        """Give the open file's contents their name again: most disks have them as long as it is open.

        Returns:
            Whether they are all there.
        """
        assert self._file is not None
        if write_again(self._file, self._path) != self._whole_bytes:
            return False
        self._open_anew()
        return True

    def rewind(self, run: Run) -> None:
        """Drop later steps; events stay. Where the file cannot be written anew, that waits like records."""
        step = run.progress.step
        self._waiting = [r for r in self._waiting if r["kind"] == "event" or r["step"] <= step]
        self._rewind_to = step if self._rewind_to is None else min(step, self._rewind_to)
        try:
            self.flush()
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Close the file; what waits is tried a last time."""
        if self._file is not None:
            try:
                self.flush()
            finally:
                self._file.close()


def _say(message: str) -> None:
    logger.warning(message)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
