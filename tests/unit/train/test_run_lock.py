"""The lock of a run folder: who has it, who waits, and file systems that know none."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.train import run_lock
from megatron_lpa.train.run_lock import WAIT_AFTER_REQUEUE_S, WAIT_S, lock_run


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_lock, "LOOK_EVERY_S", 0.01)


def failing(number: int) -> Any:
    def flock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_the_second_is_refused_and_told_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    told = rf"writing here \(process {os.getpid()} on .*, job 77\)"
    with lock_run(tmp_path), pytest.raises(TryAgain, match=told):
        lock_run(tmp_path, 0)
    lock_run(tmp_path).close()


def test_a_lock_that_goes_within_the_time_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = lock_run(tmp_path)
    release = threading.Timer(0.3, first.close)
    release.start()
    began_s = time.monotonic()
    lock_run(tmp_path, 60).close()
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


def test_how_long_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(waited), sleep=lambda _: waited.append(50.0))
    monkeypatch.setattr(run_lock, "time", clock)
    assert WAIT_AFTER_REQUEUE_S > WAIT_S
    with lock_run(tmp_path):
        for arguments, restarts, expected in (
            ((), "0", WAIT_S), ((), "1", WAIT_AFTER_REQUEUE_S), ((70.0,), "1", 70.0), ((None, 80.0), "1",
            80.0), ((0.0,), "0", 0.0),
        ):  # fmt: skip
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
            waited.clear()
            with pytest.raises(TryAgain):
                lock_run(tmp_path, *arguments)
            assert expected <= sum(waited) < expected + 50
            assert (f"Waiting up to {expected:.0f} s" in capsys.readouterr().err) == (expected > 0)


def test_a_lock_file_that_is_removed_is_made_and_locked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock_run(tmp_path) as first:
        assert first.still_held()
        (tmp_path / ".lock").unlink()
        assert first.still_held()
        assert capsys.readouterr().err.count("warning: ") == 1
        with pytest.raises(TryAgain, match=rf"another run is writing here \(process {os.getpid()} on "):
            lock_run(tmp_path, 0)
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text("of a copy\n")  # another file, which nobody has locked
        assert first.still_held()
        with pytest.raises(TryAgain, match="another run is writing here"):
            lock_run(tmp_path, 0)
    lock_run(tmp_path).close()


def test_a_run_whose_lock_another_one_took_notices_and_stays_out(tmp_path: Path) -> None:
    first = lock_run(tmp_path)
    (tmp_path / ".lock").unlink()
    with lock_run(tmp_path) as second:
        lost = first.lost()
        assert isinstance(lost, TryAgain) and f"taken this folder over (process {os.getpid()} on " in str(
            lost
        )
        assert second.still_held()
    assert not first.still_held(), "what the other one wrote is not known"
    first.close()


def test_who_waits_for_a_file_that_is_removed_does_not_get_in_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had opened the file, and locks it when the first run has let go of it for a new one."""
    first = lock_run(tmp_path)
    real, seen = run_lock._taken, []

    def taken(file: Any) -> bool:
        if not seen:
            seen.append(file)
            (tmp_path / ".lock").unlink()
            assert first.still_held()
        return real(file)

    monkeypatch.setattr(run_lock, "_taken", taken)
    with pytest.raises(TryAgain, match="another run is writing here"):
        lock_run(tmp_path, 0)
    assert first.still_held()
    first.close()


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_run_folder_that_is_gone_is_noticed(tmp_path: Path, how: str) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    lock = lock_run(folder)
    folder.rename(elsewhere)
    if how == "removed":
        shutil.rmtree(elsewhere)
    if how == "replaced":
        folder.mkdir()
    lost = lock.lost()
    assert isinstance(lost, UserError) and not isinstance(lost, TryAgain)
    assert str(lost).startswith(f"{folder}: the run folder was moved or removed")
    assert (str(elsewhere) in str(lost)) == (how != "removed")
    assert not (folder / ".lock").exists()
    lock.close()


def test_a_disk_that_does_not_answer_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_run(tmp_path)

    def failing_stat(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(run_lock.os, "lstat", failing_stat)
        assert lock.still_held()
    (tmp_path / ".lock").unlink()
    assert time.monotonic() - 1 < lock.next_look_s < time.monotonic() + 1
    assert not (tmp_path / ".lock").exists(), "not looked yet"
    assert lock.still_held() and (tmp_path / ".lock").exists()
    lock.close()


def test_a_run_on_a_file_system_without_locks_notices_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    first = lock_run(tmp_path)
    (tmp_path / ".lock").unlink()
    assert first.still_held() and (tmp_path / ".lock").exists()
    (tmp_path / ".lock").unlink()
    with lock_run(tmp_path):
        assert not first.still_held()
    first.close()


def test_a_lock_file_never_leads_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.write_text("of somebody else\n")
    (run / ".lock").symlink_to(outside)
    with pytest.raises(UserError, match=r"\.lock: a link, or no regular file; remove it"):
        lock_run(run)
    (run / ".lock").unlink()
    os.link(outside, run / ".lock")
    with lock_run(run) as lock:
        assert lock.still_held() and not os.path.samefile(outside, run / ".lock")
        with pytest.raises(TryAgain, match="another run is writing here"):
            lock_run(run, 0)
    assert outside.read_text() == "of somebody else\n"
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with pytest.raises(UserError, match=r"\.lock: a named pipe, not a regular file"):
        lock_run(run)


def test_a_file_system_that_tells_no_file_from_another_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock.os.path, "samestat", lambda *_: False)
    with lock_run(tmp_path) as lock:
        assert lock.still_held()
        with pytest.raises(TryAgain, match="another run is writing here"):
            lock_run(tmp_path, 0)


def test_a_start_that_comes_to_nothing_takes_back_what_it_made(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "deep"
    run.mkdir(parents=True)
    lock_run(run, made=[run, run.parent]).leave()
    assert list(tmp_path.iterdir()) == []
    run.mkdir(parents=True)
    (run / "note.txt").write_text("of somebody else")
    lock_run(run, made=[run, run.parent]).leave()
    assert (run / "note.txt").read_text() == "of somebody else"
    (run / "note.txt").unlink()
    lock_run(run).leave()  # it was there before
    assert [path.name for path in run.iterdir()] == [".lock"]
