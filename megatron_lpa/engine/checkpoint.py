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

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import safetensors
import torch

import megatron_lpa
from megatron_lpa.checkpoint.decisions import AT_START, Decisions
from megatron_lpa.checkpoint.manifest import (
    FORMAT,
    STATE_FORMAT,
    Progress,
    SampleOrder,
    WrittenFile,
    sealed,
    size_of,
)
from megatron_lpa.checkpoint.reshard import fragment_key, shard_name
from megatron_lpa.checkpoint.store import (
    Retention,
    check_free_space,
    due_at,
    finite_or_none,
    partial_of,
    prune,
    publish,
    remove,
)
from megatron_lpa.checkpoint.tensor_file import write_tensors
from megatron_lpa.checkpoint.unrecorded import NOTHING_UNRECORDED, Unrecorded
from megatron_lpa.config.precision import PRECISIONS
from megatron_lpa.engine import fragments as where
from megatron_lpa.engine.build import Engine
from megatron_lpa.engine.weights import copied_weights, gathered_weights, write_weights
from megatron_lpa.errors import UserError
from megatron_lpa.files import patiently
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.parallel.agreement import gather_json, gather_messages, largest_of_all
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
    except (OSError, RuntimeError, UserError) as error:
        failure = str(error)
    failures = gather_messages(failure, groups)
    if failures:
        raise CheckpointNotWritten(
            f"the checkpoint could not be written: {failures}; free disk space or choose another "
            "logging.run_dir; the newest complete checkpoint is untouched"
        )
    return files


class Saving:
    """A checkpoint on its way. Every rank makes one, which returns as soon as training may go on.

    With ``overlap`` the state is copied to the CPU's memory, which is all that training waits for, and written by a
    thread. The thread takes no part in collectives: ``complete`` agrees on the outcome. Without ``overlap`` nothing is
    copied and everything is written before this returns.

    Args:
        engine: what to save.
        folder: the run's ``checkpoints`` folder, on a file system all ranks share.
        progress: goes into the manifest.
        order: what the order of samples depends on; a resumed run must have the same.
        retention: which earlier checkpoints stay.
        validation_loss: of exactly these weights; rank 0's counts. None when validation did not run here.
        overlap: write beside training.
        decisions: what decides, as of this step, whether the run goes back; goes into the manifest.
        unrecorded: losses since the last training record; goes into the manifest.
        evaluates: whether the run has a validation and a test of its own: ``{"valid": True, "test": False}``; goes into the
            manifest, for those that have not its data at hand.

    Raises:
        CheckpointNotWritten: on every rank when any rank could not write; nothing half-written stays.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        progress: Progress,
        order: SampleOrder,
        retention: Retention = KEEP_ALL,
        validation_loss: float | None = None,
        overlap: bool = False,
        decisions: Decisions = AT_START,
        unrecorded: Unrecorded = NOTHING_UNRECORDED,
        evaluates: Mapping[str, bool] | None = None,
    ) -> None:
        started = time.perf_counter()
        self._engine, self._folder, self._retention = engine, folder, retention
        self.progress = progress
        self._final = folder / f"step_{progress.step:08d}"
        self._partial = partial_of(self._final)
        self._files: list[WrittenFile] = []
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        if engine.device.type == "cuda":
            torch.cuda.synchronize()  # DeepSpeed works on streams of its own
        fragments = where.held_fragments(engine)
        step = largest_of_all(where.optimizer_step(fragments), engine.groups)
        kinds = (where.MASTER, *where.MOMENTS) if step else (where.MASTER,)
        # Made now, as the counts that it holds move on with training.
        self._content = _manifest(engine, progress, order, step, validation_loss, decisions, unrecorded)
        if evaluates is not None:
            self._content["evaluates"] = dict(evaluates)
        with self._nothing_half_written():
            _guarded(lambda: self._make_folders(len(kinds)), engine.groups)
            self._begin(_own_tensors(fragments, kinds, engine.groups), overlap)
        self.blocked_s = time.perf_counter() - started
        """Seconds that training waited so far; without ``overlap`` all but agreeing and renaming."""

    def _make_folders(self, kinds: int) -> list[WrittenFile]:
        if self._engine.groups.rank == 0:
            self._folder.mkdir(exist_ok=True)
            remove(self._partial)
            check_free_space(self._folder, _checkpoint_bytes(self._engine, kinds))
            self._partial.mkdir()
        return []

    def _begin(self, tensors: list[tuple[str, torch.Tensor]], overlap: bool) -> None:
        if not overlap:
            self._write(tensors, gathered_weights(self._engine))
            _guarded(self._outcome, self._engine.groups)
            return
        copies: list[tuple[str, torch.Tensor]] = []
        weights: list[tuple[str, torch.Tensor | None]] = []

        def copy() -> list[WrittenFile]:
            weights.extend(
                copied_weights(self._engine)
            )  # first: it takes collectives, which no rank may miss
            copies.extend((key, tensor.to("cpu", copy=True)) for key, tensor in tensors)
            return []

        _guarded(copy, self._engine.groups)  # memory may be short on one rank alone
        thread = threading.Thread(target=self._write, args=(copies, weights), daemon=True)
        self._thread = thread
        thread.start()

    def _write(
        self,
        tensors: list[tuple[str, torch.Tensor]],
        weights: Iterable[tuple[str, torch.Tensor | None]],
    ) -> None:
        own: list[WrittenFile] = []
        try:
            name = f"state/rank_{self._engine.groups.rank:05d}.safetensors"
            own.append(write_tensors(self._partial, name, tensors))
        except Exception as error:
            self._failure = error
        try:  # also after a failure: the weights may be on their way here through collectives
            for file in write_weights(weights, self._partial / "weights"):
                own.append(dataclasses.replace(file, name=f"weights/{file.name}"))
        except Exception as error:
            self._failure = self._failure or error
        self._files = own

    def _outcome(self) -> list[WrittenFile]:
        if isinstance(self._failure, (OSError, RuntimeError, UserError)):
            raise self._failure
        if (
            self._failure is not None
        ):  # a bug; in a thread it must not go unseen, nor leave other ranks waiting
            traceback.print_exception(self._failure)
            raise RuntimeError(f"{type(self._failure).__name__}: {self._failure}")
        return self._files

    @property
    def written_here(self) -> bool:
        """Whether this process has nothing left to write."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def bytes(self) -> int:
        """What this process has written."""
        return sum(file.bytes for file in self._files)

    def complete(self) -> Path:
        """Wait for all processes' files, and give the checkpoint its name. Every rank calls it.

        Returns:
            The folder of the complete checkpoint.

        Raises:
            CheckpointNotWritten: on every rank when any rank could not write; nothing half-written stays.
        """
        started, groups = time.perf_counter(), self._engine.groups
        if self._thread is not None:
            self._thread.join()
        with self._nothing_half_written():
            own = _guarded(self._outcome, groups)
            gathered = gather_json([dataclasses.asdict(file) for file in own], groups)
            files = [WrittenFile(**described) for of_rank in gathered for described in of_rank]

            def publish_it() -> list[WrittenFile]:
                if groups.rank == 0:
                    _check_shared(self._partial, files)
                    listed = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files}
                    publish(self._final, json.dumps(sealed({**self._content, "files": listed}), indent=1))
                return []

            _guarded(publish_it, groups)
        if groups.rank == 0:
            prune(self._folder, self._retention)
        self.blocked_s += time.perf_counter() - started
        return self._final

    @contextlib.contextmanager
    def _nothing_half_written(self) -> Iterator[None]:
        try:
            yield
        except CheckpointNotWritten:
            if self._engine.groups.rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise


def save_checkpoint(
    engine: Engine,
    folder: Path,
    progress: Progress,
    order: SampleOrder,
    retention: Retention = KEEP_ALL,
    validation_loss: float | None = None,
) -> Path:
    """Write a whole checkpoint before anything else goes on; arguments and errors are those of ``Saving``."""
    return Saving(engine, folder, progress, order, retention, validation_loss).complete()


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
    weight_bytes = PRECISIONS[engine.config.train.precision].weight_bytes
    return elements * (4 * kinds + weight_bytes)


def _check_shared(partial: Path, files: Sequence[WrittenFile]) -> None:
    for file in files:
        path = partial / file.name
        if patiently(functools.partial(size_of, path), path) != file.bytes:
            raise OSError(
                f"{path}: written by another process but not seen here; all machines need one file system"
            )


def _manifest(
    engine: Engine,
    progress: Progress,
    order: SampleOrder,
    step: int,
    validation_loss: float | None,
    decisions: Decisions,
    unrecorded: Unrecorded,
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
        "decisions": dataclasses.asdict(decisions),
        "unrecorded": dataclasses.asdict(unrecorded),
        "at_interval": due_at(progress.step, engine.config.train.checkpoint_interval),
        "layout": layout_of(engine),
        "order": dataclasses.asdict(order),
        "model": dataclasses.asdict(engine.config.model),
        "config": dataclasses.asdict(engine.config),
        "state": {
            "format": STATE_FORMAT,
            "optimizer": "AdamW",
            "optimizer_step": step,
            "skipped_steps": engine.skipped_steps,
            "parameters": {n: {"shape": list(s.shape), "tp_dim": s.tp_dim} for n, s in specs.items()},
        },
    }
