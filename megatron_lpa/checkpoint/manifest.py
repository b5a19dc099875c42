"""What a checkpoint folder says about itself; needs neither DeepSpeed nor a process group."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_lpa.checkpoint.manifest_schema import check_manifest
from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.config.run import EARLIER_LAYOUTS
from megatron_lpa.errors import UserError
from megatron_lpa.files import (
    UnusableFile,
    exists,
    is_dir,
    patiently,
    read_json,
    refuse_link,
    sha256,
    write_whole,
)
from megatron_lpa.run_folder import CHECKPOINT, MANIFEST, checkpoint_name, step_of

Result = TypeVar("Result")

FORMAT = 1
STATE_FORMAT = 1

MOST_MANIFEST_BYTES = 64 << 20
"""Some 150 bytes for each file and 100 for each parameter: that of 10,000 processes and 3,000 parameters has
2 MB."""


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written: another one may be used in its place."""


@dataclass(frozen=True)
class WrittenFile:
    """A file of a checkpoint: its path inside the folder, its length, and the SHA-256 of its contents."""

    name: str
    bytes: int
    sha256: str


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of everything in it, so that damage to the manifest itself is found."""
    return {**manifest, "checksum": _checksum(manifest)}


def note_validation(checkpoint: Path, loss: float) -> None:
    """Add the validation loss of a checkpoint's weights to its manifest, where that has none yet.

    Args:
        checkpoint: a complete one.
        loss: in nats per token; finite.

    Raises:
        DamagedCheckpoint, TryAgain, UserError: as ``described``.
        OSError: it cannot be written. The manifest is then as it was.
    """
    if described(checkpoint)["validation_loss"] is None:
        manifest = read_json(checkpoint / MANIFEST, MOST_MANIFEST_BYTES)
        content = sealed({**manifest, "validation_loss": loss})
        write_whole(checkpoint / MANIFEST, json.dumps(content, indent=1))


def layout_in(manifest: dict[str, Any]) -> dict[str, Any]:
    """How a checkpoint's state is spread, under the names of this version."""
    layout = dict(manifest["layout"])
    layout["lowdim_layout"] = EARLIER_LAYOUTS.get(layout["lowdim_layout"], layout["lowdim_layout"])
    return layout


def seal_of(manifest: dict[str, Any]) -> str:
    """What tells a checkpoint from any other of the same step, whenever its validation loss was noted.

    Args:
        manifest: as ``read_manifest`` gives it.
    """
    progress = dataclasses.asdict(manifest["progress"])
    return _checksum({**manifest, "progress": progress, "validation_loss": None})


def _checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def undamaged(read: Callable[[], Result], path: Path) -> Result:
    """What ``read`` gives of a file of a checkpoint, with patience. Whoever cannot read it learns whether to
    try again.

    Args:
        read: opens and reads ``path``, anew at each attempt.
        path: for the message.

    Raises:
        DamagedCheckpoint: it is not there, or not what it has to be.
        TryAgain: the disk does not give it: an older checkpoint must not take the place of this one.
        UserError: it must not be read. Permissions can be mended, so it is no damage either.
    """
    try:
        return patiently(read, path)
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; change its permissions") from error
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path}: no such file") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: not a file that can be read: {error.strerror}") from error
    except UnusableFile as error:
        raise DamagedCheckpoint(str(error)) from error


def size_of(path: Path) -> int | None:
    """Length of a regular file; None where there is none, or something else. A link is something else."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def paths_in(folder: Path, pattern: str) -> list[Path]:
    """What a folder has under names that a regular expression fits wholly; nothing if there is no such
    folder.

    Raises:
        TryAgain: the disk does not say. To take that for an empty folder would start a run anew.
        UserError: the folder must not be read.
    """

    def look() -> list[Path]:
        try:
            return [folder / name for name in os.listdir(folder) if re.fullmatch(pattern, name)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    return undamaged(look, folder)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders called as checkpoints are, oldest first, whatever state they are in.

    Raises:
        TryAgain, UserError: as ``paths_in``.
    """
    return sorted((path for path in paths_in(folder, CHECKPOINT) if is_dir(path)), key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first.

    Raises:
        TryAgain, UserError: as ``paths_in``.
    """
    return [path for path in checkpoint_folders(folder) if exists(path / MANIFEST)]


def _inside(path: Path) -> None:
    """Nothing outside of the checkpoint is read, whatever a name in it leads to."""
    refuse_link(path, "which may lead out of the checkpoint; put what it leads to in its place")


def described(checkpoint: Path, complete: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint, of which no other file is looked at. All that is in it can be relied on.

    Args:
        checkpoint: the folder that holds it.
        complete: whether to continue from it. To use the weights, less has to be there.

    Returns:
        What it says, with ``progress`` as :class:`Progress`, and what earlier versions did not write filled
        in.

    Raises:
        DamagedCheckpoint: a manifest that is missing, changed, or says what cannot be.
        TryAgain: the disk does not give it.
        UserError: it is of another version, or must not be read.
    """
    path = checkpoint / MANIFEST
    try:
        undamaged(functools.partial(_inside, path), path)
        if not exists(path):
            raise DamagedCheckpoint(f"{path}: no such file")
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}; {checkpoint} is not a complete checkpoint") from error
    try:
        manifest = undamaged(functools.partial(read_json, path, MOST_MANIFEST_BYTES), path)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}: not a checkpoint manifest; delete {checkpoint}") from error
    try:
        if not isinstance(manifest, dict):
            raise ValueError("not a JSON object")
        if (complete or "checksum" in manifest) and manifest.get("checksum") != _checksum(manifest):
            raise ValueError("its checksum does not fit its contents")
        _refuse_other_formats(path, manifest, complete)
        check_manifest(manifest, complete)
        saved = manifest["progress"]
        progress = Progress(**{own.name: saved.get(own.name, 0) for own in dataclasses.fields(Progress)})
        if checkpoint.name != checkpoint_name(progress.step) and re.fullmatch(CHECKPOINT, checkpoint.name):
            raise ValueError(f"it is the manifest of step {progress.step}")
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: not a checkpoint manifest: {error}; delete {checkpoint}") from error
    return {"validation_loss": None, **manifest, "progress": progress}


def _refuse_other_formats(path: Path, manifest: dict[str, Any], complete: bool) -> None:
    """What another version wrote is no damage; what no version can have written is left to the schema.

    Raises:
        UserError: another format.
        ValueError: none.
    """
    state = manifest.get("state") if complete else None
    given = [("format", manifest, FORMAT)]
    if isinstance(state, dict):
        given.append(("state of format", state, STATE_FORMAT))
    for words, section, own in given:
        number = section.get("format")
        if type(number) is not int or not 1 <= number < 1 << 31:
            raise ValueError(f"{words} is missing, or no number that a version has")
        if number != own:
            raise UserError(f"{path}: {words} {number}; this version reads {own}")


def read_manifest(checkpoint: Path, under: str = "") -> dict[str, Any]:
    """The manifest of a checkpoint whose files are there, with the sizes that it says.

    Args:
        checkpoint: the folder that holds it.
        under: check the files below this folder only; using a model needs ``weights/`` and no more.

    Returns:
        As ``described``.

    Raises:
        DamagedCheckpoint: missing or changed manifest, one that says what cannot be, or a file that is
            missing, of another size, or a link.
        TryAgain: the disk does not give the manifest.
        UserError: a manifest of another version, or one that must not be read.
    """
    manifest = described(checkpoint, complete=not under)
    names = [name for name in manifest["files"] if name.startswith(under)]
    for name in names:
        path, size = checkpoint / name, manifest["files"][name]["bytes"]
        if undamaged(functools.partial(size_of, path), path) != size:
            raise DamagedCheckpoint(
                f"{path}: missing or not {size} bytes long as {MANIFEST} says; delete "
                f"{checkpoint} to continue from an earlier checkpoint"
            )
    for folder in sorted({name.partition("/")[0] for name in names}):
        undamaged(functools.partial(_inside, checkpoint / folder), checkpoint / folder)
    return manifest


def verify_files(checkpoint: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Compare the contents of a checkpoint's files with their recorded hashes.

    Raises:
        DamagedCheckpoint: a file's contents differ, or there is no such file.
        TryAgain: the disk does not give a file.
        UserError: a file must not be read.
    """
    for name in names:
        path = checkpoint / name
        if undamaged(functools.partial(sha256, path), path) != manifest["files"][name]["sha256"]:
            raise DamagedCheckpoint(
                f"{path}: the contents differ from what {MANIFEST} says: the file is damaged; delete "
                f"{checkpoint} to use an earlier checkpoint"
            )
