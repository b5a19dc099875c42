"""Conversions that are killed or interrupted, meet a full disk or a bad one: nothing is left, or the
whole."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import (
    State,
    convert_in,
    flip_bit,
    random_checkpoint,
    universal_in,
)
from support.models import MODELS

from megatron_lpa.checkpoint.manifest import checkpoint_folders, read_manifest, verify_files
from megatron_lpa.errors import UserError
from megatron_lpa.run_folder import MANIFEST

NAME = "step_00000007"


@pytest.mark.parametrize("write", [convert_in, universal_in])
def test_nothing_is_ever_replaced(
    tmp_path: Path, saved: tuple[Path, State], write: Callable[[Path, Path], object]
) -> None:
    output = tmp_path / NAME
    output.mkdir()
    with pytest.raises(UserError, match=f"{output}: exists already"):
        write(saved[0], output)
    output.rmdir()
    output.symlink_to("nowhere")
    with pytest.raises(UserError, match="exists already"):
        write(saved[0], output)
    output.unlink()
    leftover = tmp_path / f".{NAME}.partial"
    leftover.mkdir()
    (leftover / "x").write_text("of another process")
    with pytest.raises(UserError, match=f"{leftover}: what an earlier conversion left"):
        write(saved[0], output)
    assert (leftover / "x").read_text() == "of another process" and not output.exists()


def test_the_name_of_another_step_is_refused(tmp_path: Path, saved: tuple[Path, State]) -> None:
    with pytest.raises(UserError, match="the checkpoint is of step 7; call it step_00000007"):
        convert_in(saved[0], tmp_path / "step_00000008")
    convert_in(saved[0], tmp_path / "any other name")
    assert read_manifest(tmp_path / "any other name")["progress"].step == 7


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, saved: tuple[Path, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    elements = sum(value.numel() for value in saved[1].values()) // 3
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=14 * elements - 1))
    with pytest.raises(UserError, match=r"could not be written: .* takes .* are free; free disk space"):
        convert_in(saved[0], tmp_path / NAME)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=14 * elements))
    convert_in(saved[0], tmp_path / NAME)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file can grow beyond 2 KB: writes fail in the middle, as on a disk that fills.

    Not a fixture: between a fixture and its test pytest writes its own output, which may go to a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("write", [convert_in, universal_in])
def test_a_disk_that_fills_leaves_nothing(
    tmp_path: Path, saved: tuple[Path, State], write: Callable[[Path, Path], object]
) -> None:
    with small_files(), pytest.raises(UserError, match=r"could not be written: .*File too large"):
        write(saved[0], tmp_path / NAME)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("write", [convert_in, universal_in])
def test_a_disk_that_stores_something_else_is_found(
    tmp_path: Path,
    saved: tuple[Path, State],
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, Path], object],
) -> None:
    source = saved[0]
    real = os.fsync

    def damage(descriptor: int) -> None:
        real(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name in ("rank_00001.safetensors", "exp_avg.pt"):
            flip_bit(path)

    monkeypatch.setattr(os, "fsync", damage)
    with pytest.raises(UserError, match=r"contents differ|reads back otherwise"):
        write(source, tmp_path / NAME)
    assert not any(tmp_path.iterdir())


class Killed(BaseException):
    """The process ends here."""


CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "open")


@pytest.mark.parametrize("write", [convert_in, universal_in])
def test_a_kill_between_any_two_operations_leaves_nothing_or_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Path], None]
) -> None:
    model = replace(MODELS["s2_lpa"], num_layers=0)  # fewer files, and so fewer places to be killed at
    random_checkpoint(tmp_path / "source", model)
    source = tmp_path / "source" / NAME
    real = {name: getattr(os, name) for name in CALLS}
    finished, outcomes = False, []
    while not finished:
        folder = tmp_path / str(len(outcomes))
        calls = 0

        def counted(name: str) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls > len(outcomes):  # and nothing works any more: cleaning up is no part of a kill
                    raise Killed
                return None if name == "fsync" else real[name](*arguments, **options)

            return call

        with monkeypatch.context() as patched:
            for name in CALLS:
                patched.setattr(os, name, counted(name))
            try:
                write(source, folder / NAME)
                finished = True
            except Killed:
                pass
        whole = (folder / NAME).exists()
        assert whole == bool(folder.exists() and checkpoint_folders(folder))
        if whole:
            assert_whole(folder / NAME)
        outcomes.append(whole)
    assert outcomes == sorted(outcomes) and outcomes[-1] and len(outcomes) > 10


def assert_whole(output: Path) -> None:
    if (output / MANIFEST).exists():
        manifest = read_manifest(output)
        verify_files(output, manifest, manifest["files"])
    else:
        tag = (output / "latest_universal").read_text()
        done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=output / tag)
        assert done.returncode == 0


@pytest.mark.parametrize("write", [convert_in, universal_in])
def test_an_interruption_removes_what_was_begun(
    tmp_path: Path,
    saved: tuple[Path, State],
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, Path], None],
) -> None:
    real, calls = os.fsync, 0

    def interrupted(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(saved[0], tmp_path / NAME)
    assert not any(tmp_path.iterdir())
