"""A lock that a killed compilation left does not hang a run."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton

from megatron_lpa import files
from megatron_lpa.engine import compile_lock
from megatron_lpa.engine.compile_lock import wait_for_compilers
from megatron_lpa.errors import TryAgain, UserError


def lock_in(folder: Path, age_s: float = 0.0, held: bool = True) -> Path:
    """What PyTorch itself takes; not ``held`` as if the process had been killed since."""
    folder.mkdir(parents=True)
    baton = FileBaton(str(folder / "lock"))
    assert baton.try_acquire()
    if not held:
        os.close(baton.fd)
    then = time.time() - age_s
    os.utime(folder / "lock", (then, then))
    return folder / "lock"


def test_a_lock_that_was_left_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locks = [lock_in(tmp_path / "op", 700), lock_in(tmp_path / "py311_cpu" / "other", 601)]
    wait_for_compilers(tmp_path)
    assert not any(lock.exists() for lock in locks)
    said = capsys.readouterr().err
    assert all(f"note: {lock}: removed" in said for lock in locks)


def test_a_compiler_at_work_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = lock_in(tmp_path / "op", 40)
    waiter = threading.Thread(target=wait_for_compilers, args=(tmp_path,))
    waiter.start()
    waiter.join(1.2)
    assert waiter.is_alive() and lock.exists()
    lock.unlink()
    waiter.join(5)
    assert not waiter.is_alive()
    assert f"{lock}: waiting for another process to compile this" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for holders through Linux's /proc")
def test_a_lock_that_nobody_holds_is_not_waited_for_as_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held, unheld = lock_in(tmp_path / "held", 70), lock_in(tmp_path / "unheld", 61, held=False)
    waiter = threading.Thread(target=wait_for_compilers, args=(tmp_path,))
    waiter.start()
    waiter.join(1.2)
    assert waiter.is_alive() and held.exists() and not unheld.exists()
    held.unlink()
    waiter.join(5)
    assert f"{unheld}: removed" in capsys.readouterr().err
    young = lock_in(tmp_path / "young", held=False)
    wait_for_compilers(tmp_path, unheld_stale_s=1.0)
    said = capsys.readouterr().err
    assert f"{young}: left by a process that was killed; in 1 s this run removes it" in said


def test_on_a_shared_file_system_another_machine_may_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = lock_in(tmp_path / "op", 70, held=False)
    kind = next(
        line.split()[2]
        for line in sorted(
            Path("/proc/self/mounts").read_text().splitlines(), key=lambda line: -len(line.split()[1])
        )
        if str(tmp_path).startswith(line.split()[1])
    )
    monkeypatch.setattr(compile_lock, "_NETWORK", (kind,))
    waiter = threading.Thread(target=wait_for_compilers, args=(tmp_path,))
    waiter.start()
    waiter.join(1.2)
    assert waiter.is_alive() and lock.exists()
    lock.unlink()
    waiter.join(5)


def test_the_folder_is_the_one_that_pytorch_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = lock_in(Path(_get_build_directory("some_op", verbose=False)) / "op", 700)
    wait_for_compilers()
    assert not lock.exists()


def test_without_any_extension_there_is_nothing_to_do(tmp_path: Path) -> None:
    wait_for_compilers(tmp_path / "not there")


def test_a_lock_dated_in_the_future_is_waited_for_no_longer_than_others(tmp_path: Path) -> None:
    lock = lock_in(tmp_path / "op", age_s=-7200)
    started = time.monotonic()
    wait_for_compilers(tmp_path, stale_s=1.0)
    assert not lock.exists() and 1.0 <= time.monotonic() - started < 10


def test_a_clock_that_jumps_does_not_make_a_lock_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_in(tmp_path / "op")
    waiter = threading.Thread(target=wait_for_compilers, args=(tmp_path,))
    waiter.start()
    waiter.join(0.3)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    waiter.join(1.5)
    assert waiter.is_alive() and lock.exists()
    lock.unlink()
    waiter.join(5)
    # Nor does one whose clock is ahead of the file server's.
    lock = lock_in(tmp_path / "other")
    waiter = threading.Thread(target=wait_for_compilers, args=(tmp_path,))
    waiter.start()
    waiter.join(1.5)
    assert waiter.is_alive() and lock.exists()
    lock.unlink()
    waiter.join(5)


def test_a_lock_that_another_process_takes_next_is_young_again(tmp_path: Path) -> None:
    lock = lock_in(tmp_path / "op")
    waiter = threading.Thread(target=wait_for_compilers, args=(tmp_path,), kwargs={"stale_s": 2.5})
    waiter.start()
    time.sleep(1.5)
    lock.unlink()
    assert FileBaton(str(lock)).try_acquire()
    waiter.join(1.5)
    assert waiter.is_alive() and lock.exists()
    waiter.join(5)
    assert not lock.exists()


def test_a_lock_that_cannot_be_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_in(tmp_path / "op", 700)
    for number, kind in ((errno.EPERM, UserError), (errno.EROFS, UserError), (errno.EIO, TryAgain)):

        def refuse(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        with (
            monkeypatch.context() as patched,
            pytest.raises(UserError, match=r"op/lock: .* cannot be removed") as raised,
        ):
            patched.setattr(os, "unlink", refuse)
            wait_for_compilers(tmp_path)
        assert type(raised.value) is kind and lock.exists()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EACCES])
def test_a_folder_that_cannot_be_listed_at_once_ends_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As where another run removes what it built."""
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    (tmp_path / "py311_cpu" / "op").mkdir(parents=True)
    for call in ("listdir", "scandir"):
        real, failed = getattr(os, call), []

        def fails(path: object = ".", call: Any = real, failed: list[int] = failed) -> Any:
            if str(path).endswith("py311_cpu") and not failed:
                failed.append(number)
                raise OSError(number, os.strerror(number), str(path))
            return call(path)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, fails)
            wait_for_compilers(tmp_path)
