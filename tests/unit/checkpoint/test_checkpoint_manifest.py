"""A file that the disk does not give is asked for again, and is never called damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from support.manifests import small_checkpoint

from megatron_lpa import files
from megatron_lpa.checkpoint import manifest as module
from megatron_lpa.checkpoint.manifest import (
    DamagedCheckpoint,
    checkpoint_folders,
    complete_checkpoints,
    read_manifest,
    verify_files,
)
from megatron_lpa.errors import EXIT_FAILED, TryAgain
from megatron_lpa.run_folder import MANIFEST

CONTENT = b"0123456789"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    small_checkpoint(tmp_path, 3, CONTENT)
    return tmp_path / "step_00000003"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    return waited


def failing(times: int, work: Any) -> Any:
    left = [times]

    def attempt(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return work(*arguments)

    return attempt


@pytest.mark.parametrize("times", [1, 3, 4])
@pytest.mark.parametrize("what", ["manifest", "size", "contents"])
def test_a_disk_that_does_not_answer_is_no_damage(
    checkpoint: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch, what: str, times: int
) -> None:
    if what == "manifest":
        monkeypatch.setattr(module, "read_json", failing(times, module.read_json))
    elif what == "size":
        monkeypatch.setattr(module, "size_of", failing(times, module.size_of))
    else:
        monkeypatch.setattr(module, "sha256", failing(times, module.sha256))

    def verify() -> None:
        verify_files(checkpoint, read_manifest(checkpoint), ["state/x"])

    if times <= len(files.PAUSES_S):
        verify()
    else:
        with pytest.raises(TryAgain, match=r"Input/output error.* start again when the disk answers") as told:
            verify()
        assert str(told.value).startswith(str(checkpoint)) and told.value.exit_code == EXIT_FAILED
    assert pauses == list(files.PAUSES_S[:times])


def test_what_is_not_there_is_damage_at_once(checkpoint: Path, pauses: list[float]) -> None:
    manifest = read_manifest(checkpoint)
    (checkpoint / "state/x").unlink()
    with pytest.raises(DamagedCheckpoint, match="state/x"):
        verify_files(checkpoint, manifest, ["state/x"])
    with pytest.raises(DamagedCheckpoint, match="missing or not 10 bytes long"):
        read_manifest(checkpoint)
    (checkpoint / MANIFEST).unlink()
    (checkpoint / MANIFEST).mkdir()
    with pytest.raises(DamagedCheckpoint, match="a folder, not a regular file"):
        read_manifest(checkpoint)
    assert pauses == []


@pytest.mark.parametrize("times", [3, 4])
@pytest.mark.parametrize("call", ["listdir", "stat"])
def test_a_folder_that_the_disk_does_not_list_is_no_empty_folder(
    checkpoint: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch, call: str, times: int
) -> None:
    """Else a run would begin anew, beside its checkpoints."""
    monkeypatch.setattr(os, call, failing(times, getattr(os, call)))
    for look in (checkpoint_folders, complete_checkpoints):
        if times == 3:
            assert look(checkpoint.parent) == [checkpoint]
        else:
            with pytest.raises(TryAgain, match="Input/output error"):
                look(checkpoint.parent)
            break
    assert checkpoint_folders(checkpoint.parent / "nowhere") == []
