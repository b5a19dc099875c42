"""A file that the disk does not give is asked for again, and is never called damaged."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa.engine import manifest as module
from megatron_lpa.engine.manifest import (
    FORMAT,
    MANIFEST,
    DamagedCheckpoint,
    read_manifest,
    sealed,
    verify_files,
)
from megatron_lpa.errors import EXIT_FAILED, TryAgain

CONTENT = b"0123456789"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000003"
    (folder / "state").mkdir(parents=True)
    (folder / "state/x").write_bytes(CONTENT)
    files = {"state/x": {"bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}}
    content = {"format": FORMAT, "progress": {"step": 3}, "files": files}
    (folder / MANIFEST).write_text(json.dumps(sealed(content)))
    return folder


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    return waited


def failing(times: int, work: Any) -> Any:
    left = [times]

    def attempt(path: Path) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return work(path)

    return attempt


@pytest.mark.parametrize("times", [1, 3, 4])
@pytest.mark.parametrize("what", ["manifest", "size", "contents"])
def test_a_disk_that_does_not_answer_is_no_damage(
    checkpoint: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch, what: str, times: int
) -> None:
    if what == "manifest":
        monkeypatch.setattr(Path, "read_bytes", failing(times, Path.read_bytes))
    elif what == "size":
        monkeypatch.setattr(module, "_size_of", failing(times, module._size_of))
    else:
        monkeypatch.setattr(module, "sha256", failing(times, module.sha256))

    def verify() -> None:
        verify_files(checkpoint, read_manifest(checkpoint), ["state/x"])

    if times <= len(module.PAUSES_S):
        verify()
    else:
        with pytest.raises(TryAgain, match=r"Input/output error.* start again when the disk answers") as told:
            verify()
        assert str(told.value).startswith(str(checkpoint)) and told.value.exit_code == EXIT_FAILED
    assert pauses == list(module.PAUSES_S[:times])


def test_what_is_not_there_is_damage_at_once(checkpoint: Path, pauses: list[float]) -> None:
    manifest = read_manifest(checkpoint)
    (checkpoint / "state/x").unlink()
    with pytest.raises(DamagedCheckpoint, match="state/x"):
        verify_files(checkpoint, manifest, ["state/x"])
    with pytest.raises(DamagedCheckpoint, match="missing or not 10 bytes long"):
        read_manifest(checkpoint)
    (checkpoint / MANIFEST).unlink()
    (checkpoint / MANIFEST).mkdir()
    with pytest.raises(DamagedCheckpoint, match="not a file that can be read"):
        read_manifest(checkpoint)
    assert pauses == []
