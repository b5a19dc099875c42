"""Writing checkpoints: a state that fits any layout, weights for use, a manifest that makes them whole.

``<run>/checkpoints/step_NNNNNNNN/`` holds

* ``state/rank_NNNNN.safetensors``: fp32 masters and AdamW's moments, each process its own fragments;
* ``weights/model.safetensors`` (or several files and an index): the unsharded weights in the run's
  precision, for evaluation, generation and export;
* ``manifest.json``: written last. A folder without it is not a checkpoint.

Everything is written to ``.step_NNNNNNNN.partial`` beside it and renamed when complete, so a crash or
a full disk leaves nothing that looks like a checkpoint. Nothing is pickled, so nothing that is read from a
checkpoint can run code. ``resume.py`` reads it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import safetensors
import torch
import torch.distributed as dist

import megatron_lpa
from megatron_lpa.engine import fragments as where
from megatron_lpa.engine.build import Engine
from megatron_lpa.engine.manifest import (
    FORMAT,
    STATE_FORMAT,
    Progress,
    SampleOrder,
    WrittenFile,
    sealed,
)
from megatron_lpa.engine.reshard import fragment_key, shard_name
from megatron_lpa.engine.store import (
    Retention,
    check_free_space,
    finite_or_none,
    partial_of,
    prune,
    publish,
)
from megatron_lpa.engine.tensor_file import write_tensors
from megatron_lpa.engine.weights import write_weights
from megatron_lpa.errors import UserError
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.parallel.agreement import gather_messages, largest_of_all
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import spec_of

KEEP_ALL = Retention()


class CheckpointNotWritten(UserError):
    """A checkpoint could not be written; the earlier ones are untouched, and training could go on."""


def layout_of(engine: Engine) -> dict[str, Any]:
    """How the engine's state is spread."""
    return {
        "tensor_parallel_size": engine.groups.tp_size,
        "data_parallel_size": engine.groups.dp_size,
        "lowdim_layout": engine.config.parallel.lowdim_layout,
        "zero_stage": engine.zero_stage,
        "precision": engine.config.train.precision,
        "micro_batch_size": engine.config.train.micro_batch_size,
    }


def _guarded(work: Callable[[], list[WrittenFile]], groups: ParallelGroups) -> list[WrittenFile]:
    """Run ``work`` on every rank; fail together if any rank failed."""
    files: list[WrittenFile] = []
    failure = None
    try:
        files = work()
    except (OSError, RuntimeError) as error:
        failure = str(error)
    failures = gather_messages(failure, groups)
    if failures:
        raise CheckpointNotWritten(
            f"the checkpoint could not be written: {failures}; free disk space or choose another "
            "logging.run_dir; the newest complete checkpoint is untouched"
        )
    return files


def save_checkpoint(
    engine: Engine,
    folder: Path,
    progress: Progress,
    order: SampleOrder,
    retention: Retention = KEEP_ALL,
    validation_loss: float | None = None,
) -> Path:
    """Write a checkpoint of the current state; every rank calls it.

    Args:
        engine: what to save.
        folder: the run's ``checkpoints`` folder, on a file system all ranks share.
        progress: goes into the manifest.
        order: what the order of samples depends on; a resumed run must have the same.
        retention: which earlier checkpoints stay.
        validation_loss: of exactly these weights; rank 0's counts. None when validation did not run here.

    Returns:
        The folder of the complete checkpoint.

    Raises:
        CheckpointNotWritten: on every rank when any rank could not write; nothing half-written stays.
    """
    final = folder / f"step_{progress.step:08d}"
    partial = partial_of(final)
    groups = engine.groups
    if engine.device.type == "cuda":
        torch.cuda.synchronize()  # DeepSpeed works on streams of its own
    fragments = where.held_fragments(engine)
    step = largest_of_all(where.optimizer_step(fragments), groups)
    kinds = (where.MASTER, *where.MOMENTS) if step else (where.MASTER,)

    def make_folders() -> list[WrittenFile]:
        if groups.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            check_free_space(folder, _checkpoint_bytes(engine, len(kinds)))
            partial.mkdir()
        return []

    def write_state() -> list[WrittenFile]:
        tensors = _own_tensors(fragments, kinds, groups)
        return [write_tensors(partial, f"state/rank_{groups.rank:05d}.safetensors", tensors)]

    def write_unsharded() -> list[WrittenFile]:
        files = write_weights(engine, partial / "weights")
        return [dataclasses.replace(file, name=f"weights/{file.name}") for file in files]

    try:
        _guarded(make_folders, groups)
        own = _guarded(write_state, groups)
        own += _guarded(write_unsharded, groups)
        described: list[Any] = [own]
        if groups.control_group is not None:
            described = [None] * groups.world_size
            dist.all_gather_object(described, own, group=groups.control_group)
        files: list[WrittenFile] = [file for rank_files in described for file in rank_files]

        def complete() -> list[WrittenFile]:
            if groups.rank == 0:
                _check_shared(partial, files)
                content = _manifest(engine, progress, order, files, step, validation_loss)
                publish(final, json.dumps(sealed(content), indent=1))
            return []

        _guarded(complete, groups)
    except CheckpointNotWritten:
        if groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if groups.rank == 0:
        prune(folder, retention)
    return final


def _own_tensors(
    fragments: Sequence[where.Fragment], kinds: Sequence[str], groups: ParallelGroups
) -> list[tuple[str, torch.Tensor]]:
    tensors = []
    for fragment in fragments:
        first, end = fragment.share()
        if first == end:
            continue
        shard = shard_name(fragment.spec.tp_dim, groups.tp_rank, groups.tp_size)
        for kind in kinds:
            key = fragment_key(fragment.name, kind, shard, fragment.start + first)
            tensors.append((key, fragment.view(kind)[first:end]))
    return tensors


def _checkpoint_bytes(engine: Engine, kinds: int) -> int:
    elements = sum(math.prod(spec_of(p).shape) for p in engine.module.parameters())
    weight_bytes = 2 if engine.config.train.precision == "bf16" else 4
    return elements * (4 * kinds + weight_bytes)


def _check_shared(partial: Path, files: Sequence[WrittenFile]) -> None:
    for file in files:
        path = partial / file.name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise OSError(
                f"{path}: written by another process but not seen here; all machines need one file system"
            )


def _manifest(
    engine: Engine,
    progress: Progress,
    order: SampleOrder,
    files: Sequence[WrittenFile],
    step: int,
    validation_loss: float | None,
) -> dict[str, Any]:
    specs = {name: spec_of(parameter) for name, parameter in named_parameters_once(engine.module)}
    return {
        "format": FORMAT,
        "versions": {
            "megatron_lpa": megatron_lpa.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "safetensors": safetensors.__version__,
        },
        "progress": dataclasses.asdict(progress),
        "validation_loss": finite_or_none(validation_loss),
        "layout": layout_of(engine),
        "order": dataclasses.asdict(order),
        "model": dataclasses.asdict(engine.config.model),
        "config": dataclasses.asdict(engine.config),
        "state": {
            "format": STATE_FORMAT,
            "optimizer": "AdamW",
            "optimizer_step": step,
            "skipped_steps": int(engine.ds.skipped_steps),
            "parameters": {n: {"shape": list(s.shape), "tp_dim": s.tp_dim} for n, s in specs.items()},
        },
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files},
    }
