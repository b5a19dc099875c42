"""Checkpoints: DeepSpeed's files for resuming, safetensors for using, a manifest that makes them whole.

``<run>/checkpoints/step_NNNNNNNN/`` holds

* ``state/``: DeepSpeed's own files, one set per rank;
* ``weights/model.safetensors`` (or several files and an index): the unsharded weights in the run's
  precision, for evaluation, generation and export;
* ``manifest.json``: written last. A folder without it is not a checkpoint.

Everything is written to ``.step_NNNNNNNN.partial`` beside it and renamed when complete, so a crash or
a full disk leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

import megatron_lpa
from megatron_lpa.engine.build import Engine
from megatron_lpa.engine.weights import write_weights
from megatron_lpa.errors import UserError
from megatron_lpa.parallel.agreement import gather_messages
from megatron_lpa.parallel.groups import ParallelGroups

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


class _GuardedWriter(TorchCheckpointEngine):
    """Writes DeepSpeed's files durably and remembers a failure instead of raising it.

    DeepSpeed's save has barriers inside: a rank that raised between them would leave the others waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None
        self.written: list[str] = []

    def save(self, state_dict: Any, path: str) -> None:
        if self.failure:
            return
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file, _use_new_zipfile_serialization=False)
                file.flush()
                os.fsync(file.fileno())
            self.written.append(path)
        except (OSError, RuntimeError) as error:
            self.failure = f"{path}: {error}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _layout(engine: Engine) -> dict[str, Any]:
    return {
        "tensor_parallel_size": engine.groups.tp_size,
        "data_parallel_size": engine.groups.dp_size,
        "lowdim_layout": engine.config.parallel.lowdim_layout,
        "zero_stage": engine.zero_stage,
        "precision": engine.config.train.precision,
    }


def _guarded(work: Callable[[], list[Path]], groups: ParallelGroups) -> list[tuple[Path, int, str]]:
    """Run ``work`` on every rank; describe the files it wrote; fail together if any rank failed."""
    files: list[tuple[Path, int, str]] = []
    failure = None
    try:
        files = [(path, path.stat().st_size, _sha256(path)) for path in work()]
    except (OSError, RuntimeError) as error:
        failure = str(error)
    failures = gather_messages(failure, groups)
    if failures:
        raise UserError(
            f"the checkpoint could not be written: {failures}; free disk space or choose another "
            "logging.run_dir; the newest complete checkpoint is untouched"
        )
    return files


def save_checkpoint(engine: Engine, folder: Path, progress: Progress, keep: int) -> Path:
    """Write a checkpoint of the current state; every rank calls it.

    Args:
        engine: what to save.
        folder: the run's ``checkpoints`` folder, on a file system all ranks share.
        progress: goes into the manifest.
        keep: newest checkpoints to keep; 0 keeps all.

    Returns:
        The folder of the complete checkpoint.

    Raises:
        UserError: on every rank when any rank could not write; nothing half-written stays.
    """
    final = folder / f"step_{progress.step:08d}"
    if (final / MANIFEST).exists():
        return final
    partial = folder / f".{final.name}.partial"
    groups = engine.groups
    if groups.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # a folder without a manifest
    _barrier(groups)

    def write_state() -> list[Path]:
        (partial / "state").mkdir(parents=True, exist_ok=True)
        writer = _GuardedWriter()
        previous, engine.ds.checkpoint_engine = engine.ds.checkpoint_engine, writer
        try:
            engine.ds.save_checkpoint(str(partial), tag="state", save_latest=False)
        finally:
            engine.ds.checkpoint_engine = previous
        if writer.failure:
            raise OSError(writer.failure)
        return [Path(path) for path in writer.written]

    try:
        files = _guarded(write_state, groups)
        files += _guarded(lambda: write_weights(engine, partial / "weights"), groups)
        described: list[Any] = [None] * groups.world_size
        dist.all_gather_object(described, files, group=groups.control_group)
        manifest = {
            "format": FORMAT,
            "version": megatron_lpa.__version__,
            "torch": torch.__version__,
            "progress": dataclasses.asdict(progress),
            "layout": _layout(engine),
            "model": dataclasses.asdict(engine.config.model),
            "files": {
                str(path.relative_to(partial)): {"bytes": size, "sha256": digest}
                for rank_files in described
                for path, size, digest in rank_files
            },
        }

        def publish() -> list[Path]:
            if groups.rank == 0:
                _write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
                os.replace(partial, final)
                _fsync_folder(folder)
            return []

        _guarded(publish, groups)
    except UserError:
        if groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if groups.rank == 0 and keep:
        for old in complete_checkpoints(folder)[:-keep]:
            (old / MANIFEST).unlink()  # first, so that a kill in between leaves no torn checkpoint
            shutil.rmtree(old, ignore_errors=True)
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    found = [
        p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name) and (p / MANIFEST).exists()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

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
        if not file.is_file() or file.stat().st_size != described["bytes"]:
            raise UserError(
                f"{file}: missing or not {described['bytes']} bytes long as {MANIFEST} says; delete "
                f"{checkpoint} to continue from an earlier checkpoint"
            )
    return {**manifest, "progress": progress}


def load_checkpoint(engine: Engine, checkpoint: Path) -> Progress:
    """Continue from a checkpoint of the same model and layout; every rank calls it.

    Raises:
        UserError: damaged files, another model or another layout; the message lists what differs.
    """
    manifest = read_manifest(checkpoint)
    for section, own in (("model", dataclasses.asdict(engine.config.model)), ("layout", _layout(engine))):
        saved = manifest[section]
        differing = _differences(saved, own, section)
        if differing:
            raise UserError(
                f"{checkpoint} was written by another {section}: {'; '.join(differing)}. Continue with the "
                "saved settings, or start a new run under another logging.name"
            )
    path, _ = engine.ds.load_checkpoint(
        str(checkpoint), tag="state", load_lr_scheduler_states=False, load_module_strict=True
    )
    assert path is not None, checkpoint
    return manifest["progress"]


def _differences(saved: Any, own: Any, name: str) -> list[str]:
    if isinstance(saved, dict) and isinstance(own, dict):
        return [
            line
            for key in sorted(saved.keys() | own.keys())
            for line in _differences(saved.get(key), own.get(key), f"{name}.{key}")
        ]
    return [] if saved == own else [f"{name} was {saved}, is {own}"]


def _barrier(groups: ParallelGroups) -> None:
    if groups.control_group is not None:
        dist.barrier(group=groups.control_group)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
