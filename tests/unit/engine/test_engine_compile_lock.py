"""A lock that a killed compilation left does not hang a run."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton

from megatron_lpa.engine.compile_lock import wait_for_compilers


def lock_in(folder: Path, age_s: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    baton = FileBaton(str(folder / "lock"))  # what PyTorch itself takes
    assert baton.try_acquire()
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


def test_the_folder_is_the_one_that_pytorch_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = lock_in(Path(_get_build_directory("some_op", verbose=False)) / "op", 700)
    wait_for_compilers()
    assert not lock.exists()


def test_without_any_extension_there_is_nothing_to_do(tmp_path: Path) -> None:
    wait_for_compilers(tmp_path / "not there")
