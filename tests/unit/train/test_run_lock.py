"""The lock of a run folder: who has it, who waits, and file systems that know none."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.train import run_lock
from megatron_lpa.train.run_lock import WAIT_AFTER_REQUEUE_S, WAIT_S, lock_run, wait_s


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "RUN_LOCK_WAIT_S"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_lock, "_LOOK_EVERY_S", 0.01)


def failing(number: int) -> Any:
    def flock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_the_second_is_refused_and_told_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with lock_run(tmp_path):
        monkeypatch.setenv("RUN_LOCK_WAIT_S", "0")
        with pytest.raises(TryAgain, match=rf"writing here \(process {os.getpid()} on .*, job 77\)"):
            lock_run(tmp_path)
    lock_run(tmp_path).close()


def test_a_lock_that_goes_within_the_time_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUN_LOCK_WAIT_S", "60")
    first = lock_run(tmp_path)
    release = threading.Timer(0.3, first.close)
    release.start()
    began_s = time.monotonic()
    lock_run(tmp_path).close()
    assert 0.2 < time.monotonic() - began_s < 30
    told = capsys.readouterr().err
    assert told.count("note: ") == 1 and "Waiting up to 60 s" in told and "Ctrl-C" in told


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    lock_run(tmp_path).close()
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and "has no locks" in told and "would not be noticed" in told


def test_another_failure_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(TryAgain, match=r"\.lock: cannot be locked: .*Input/output error"):
        lock_run(tmp_path)
    with pytest.raises(TryAgain, match=r"cannot be written.*choose another logging.run_dir"):
        lock_run(tmp_path / "missing")


def test_how_long_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wait_s() == WAIT_S
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert wait_s() == WAIT_AFTER_REQUEUE_S > WAIT_S
    monkeypatch.setenv("RUN_LOCK_WAIT_S", "1.5")
    assert wait_s() == 1.5
    monkeypatch.setenv("RUN_LOCK_WAIT_S", "long")
    with pytest.raises(UserError, match="RUN_LOCK_WAIT_S is 'long'"):
        wait_s()
