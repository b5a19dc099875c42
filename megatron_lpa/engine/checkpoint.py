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
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

import megatron_lpa
from megatron_lpa.config.compare import differences
from megatron_lpa.engine.build import Engine
from megatron_lpa.engine.manifest import (
    FORMAT,
    MANIFEST,
    Progress,
    SampleOrder,
    complete_checkpoints,
    read_manifest,
    sha256,
    verify_files,
)
from megatron_lpa.engine.weights import write_weights
from megatron_lpa.errors import UserError
from megatron_lpa.parallel.agreement import gather_messages, together
from megatron_lpa.parallel.groups import ParallelGroups


class _GuardedWriter(TorchCheckpointEngine):
    """Writes DeepSpeed's files and remembers a failure instead of raising it.

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
            self.written.append(path)
        except (OSError, RuntimeError) as error:
            self.failure = f"{path}: {error}"


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
        files = [(path, path.stat().st_size, sha256(path)) for path in work()]
        for path in {file for file, _, _ in files} | {file.parent for file, _, _ in files}:
            _fsync(path)
    except (OSError, RuntimeError) as error:
        failure = str(error)
    failures = gather_messages(failure, groups)
    if failures:
        raise UserError(
            f"the checkpoint could not be written: {failures}; free disk space or choose another "
            "logging.run_dir; the newest complete checkpoint is untouched"
        )
    return files


def save_checkpoint(engine: Engine, folder: Path, progress: Progress, keep: int, order: SampleOrder) -> Path:
    """Write a checkpoint of the current state; every rank calls it.

    Args:
        engine: what to save.
        folder: the run's ``checkpoints`` folder, on a file system all ranks share.
        progress: goes into the manifest.
        keep: newest checkpoints to keep; 0 keeps all.
        order: what the order of samples depends on; a resumed run must have the same.

    Returns:
        The folder of the complete checkpoint.

    Raises:
        UserError: on every rank when any rank could not write; nothing half-written stays.
    """
    final = folder / f"step_{progress.step:08d}"
    partial = folder / f".{final.name}.partial"
    groups = engine.groups

    def make_folders() -> list[Path]:
        if groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "state").mkdir(parents=True)
        return []

    def write_state() -> list[Path]:
        writer = _GuardedWriter()
        previous, engine.ds.checkpoint_engine = engine.ds.checkpoint_engine, writer
        # DeepSpeed would copy scripts beside its files; a disk that fills up there would stop rank 0 alone.
        engine.ds._copy_recovery_script = lambda save_path: None
        try:
            engine.ds.save_checkpoint(str(partial), tag="state", save_latest=False)
        finally:
            engine.ds.checkpoint_engine = previous
        if writer.failure:
            raise OSError(writer.failure)
        return [Path(path) for path in writer.written]

    try:
        _guarded(make_folders, groups)
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
            "order": dataclasses.asdict(order),
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
                shutil.rmtree(final, ignore_errors=True)  # this step's checkpoint from before a resume
                os.replace(partial, final)
                _fsync(folder)
            return []

        _guarded(publish, groups)
    except UserError:
        if groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if groups.rank == 0 and keep:
        for old in complete_checkpoints(folder)[:-keep]:
            try:
                (old / MANIFEST).unlink()  # first, so that a kill in between leaves no torn checkpoint
                shutil.rmtree(old)
            except OSError as error:
                print(f"warning: an old checkpoint cannot be removed: {error}", file=sys.stderr, flush=True)
    return final


def remove_incomplete(folder: Path) -> None:
    """Remove what an interrupted save or removal left: partial folders and those without a manifest."""
    for path in [*folder.glob(".step_*.partial"), *folder.glob("step_*")]:
        if path.is_dir() and (path.name.startswith(".") or not (path / MANIFEST).exists()):
            shutil.rmtree(path)


def load_checkpoint(engine: Engine, checkpoint: Path, order: SampleOrder) -> Progress:
    """Continue from a checkpoint of the same model, layout and sample order; every rank calls it.

    Raises:
        UserError: damaged files, or another model, layout or order; the message lists what differs.
    """
    manifest = together(lambda: _verified_manifest(checkpoint, engine.groups), engine.groups)
    sections = {
        "model": dataclasses.asdict(engine.config.model),
        "layout": _layout(engine),
        "order": dataclasses.asdict(order),
    }
    for section, own in sections.items():
        differing = differences(manifest[section], own, section)
        if differing:
            raise UserError(
                f"{checkpoint} was written with another {section}: {'; '.join(differing)}. Continue with the "
                "saved settings, or start a new run under another logging.name"
            )
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints the names of its attributes
        path, _ = engine.ds.load_checkpoint(
            str(checkpoint), tag="state", load_lr_scheduler_states=False, load_module_strict=True
        )
    assert path is not None, checkpoint
    engine.apply_optimizer_settings()
    return manifest["progress"]


def _verified_manifest(checkpoint: Path, groups: ParallelGroups) -> dict[str, Any]:
    """The manifest, with this rank's share of all files compared with their hashes."""
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest, sorted(manifest["files"])[groups.rank :: groups.world_size])
    return manifest


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
