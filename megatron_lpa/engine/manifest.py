"""What a checkpoint folder says about itself; needs neither DeepSpeed nor a process group."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lpa.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far a run has come; with the config it determines everything that follows.

    Args:
        step: optimizer steps done.
        consumed_samples: sequences read for training.
        consumed_tokens: tokens predicted in training.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


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


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    found = [
        p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name) and (p / MANIFEST).exists()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_manifest(checkpoint: Path, under: str = "") -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
        checkpoint: the folder that holds it.
        under: check the files below this folder only; using a model needs ``weights/`` and no more.

    Raises:
        UserError: missing or unreadable manifest, or a file that is missing or of another size.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        progress = Progress(**manifest["progress"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {checkpoint} is not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint manifest: {error!r}; delete {checkpoint}") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}")
    for name, described in files.items():
        file = checkpoint / name
        if not name.startswith(under):
            continue
        if not file.is_file() or file.stat().st_size != described["bytes"]:
            raise UserError(
                f"{file}: missing or not {described['bytes']} bytes long as {MANIFEST} says; delete "
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
        UserError: a file's contents differ.
    """
    for name in names:
        if sha256(checkpoint / name) != manifest["files"][name]["sha256"]:
            raise UserError(
                f"{checkpoint / name}: the contents differ from what {MANIFEST} says: the file is damaged; delete "
                f"{checkpoint} to use an earlier checkpoint"
            )
