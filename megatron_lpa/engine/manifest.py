"""What a checkpoint folder says about itself; needs neither DeepSpeed nor a process group."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from megatron_lpa.errors import TryAgain, UserError

Result = TypeVar("Result")

MANIFEST = "manifest.json"
FORMAT = 1
STATE_FORMAT = 1

PAUSES_S = (0.2, 1.0, 3.0)
"""Before a file that the disk did not give is asked for again."""

_NOT_A_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written: another one may be used in its place."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come; with the config it determines everything that follows.

    Args:
        step: optimizer steps done.
        consumed_samples: sequences read for training.
        consumed_tokens: tokens predicted in training.
        skipped_samples: samples passed over when the run went back to a checkpoint; they count as neither.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_samples: int = 0

    @property
    def position(self) -> int:
        """Where in the order of samples the next step begins."""
        return self.consumed_samples + self.skipped_samples


@dataclass(frozen=True)
class SampleOrder:
    """What the order of training samples depends on: with it, consumed samples say which come next.

    Args:
        seed: the run's seed.
        samples_per_epoch: samples of the training split that can be read before any comes again.
        samples_per_step: the global batch size; steps, and so the length and the schedule, count in it.
        data: what tells the data from other data: hashes of contents, ranges of documents, weights; no
            paths and no dates.
    """

    seed: int
    samples_per_epoch: int
    samples_per_step: int
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenFile:
    """A file of a checkpoint: its path inside the folder, its length, and the SHA-256 of its contents."""

    name: str
    bytes: int
    sha256: str


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders called as checkpoints are, oldest first, whatever state they are in."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return [path for path in checkpoint_folders(folder) if (path / MANIFEST).exists()]


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of everything in it, so that damage to the manifest itself is found."""
    return {**manifest, "checksum": _checksum(manifest)}


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _patiently(read: Callable[[Path], Result], path: Path) -> Result:
    """What ``read`` gives of ``path``, with further attempts where the disk does not answer: that is no damage.

    Raises:
        TryAgain: no attempt succeeded.
        OSError: one of ``_NOT_A_FILE``, at once.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return read(path)
        except _NOT_A_FILE:
            raise
        except OSError as error:
            if pause_s is None:
                raise TryAgain(
                    f"{path}: cannot be read ({error}), which need not mean damage, so nothing is used in its place; start "
                    "again when the disk answers, or rename the checkpoint to damaged_step_... to do without it"
                ) from error
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def read_manifest(checkpoint: Path, under: str = "") -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
        checkpoint: the folder that holds it.
        under: check the files below this folder only; using a model needs ``weights/`` and no more.

    Raises:
        DamagedCheckpoint: missing or changed manifest, or a file that is missing or of another size.
        TryAgain: the disk does not give the manifest.
        UserError: a manifest of another version.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(_patiently(Path.read_bytes, path))
        if (not under or "checksum" in manifest) and manifest.get("checksum") != _checksum(manifest):
            raise ValueError("its checksum does not fit its contents")
        files = {name: int(described["bytes"]) for name, described in manifest["files"].items()}
        progress = Progress(**manifest["progress"])
        if f"step_{progress.step:08d}" != checkpoint.name and re.fullmatch(r"step_\d{8,}", checkpoint.name):
            raise ValueError(f"it is the manifest of step {progress.step}")
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is outside of the checkpoint")
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: no such file; {checkpoint} is not a complete checkpoint") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: not a file that can be read: {error}") from error
    except TryAgain:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{path}: not a checkpoint manifest: {error!r}; delete {checkpoint}"
        ) from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}")
    for name, size in files.items():
        file = checkpoint / name
        if not name.startswith(under):
            continue
        if _patiently(_size_of, file) != size:
            raise DamagedCheckpoint(
                f"{file}: missing or not {size} bytes long as {MANIFEST} says; delete "
                f"{checkpoint} to continue from an earlier checkpoint"
            )
    return {**manifest, "progress": progress}


def sha256(path: Path) -> str:
    """Hash of a file's contents, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def verify_files(checkpoint: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Compare the contents of a checkpoint's files with their recorded hashes.

    Raises:
        DamagedCheckpoint: a file's contents differ, or there is no such file.
        TryAgain: the disk does not give a file.
    """
    for name in names:
        path = checkpoint / name
        try:
            found = _patiently(sha256, path)
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: not a file that can be read: {error}") from error
        if found != manifest["files"][name]["sha256"]:
            raise DamagedCheckpoint(
                f"{checkpoint / name}: the contents differ from what {MANIFEST} says: the file is damaged; delete "
                f"{checkpoint} to use an earlier checkpoint"
            )
