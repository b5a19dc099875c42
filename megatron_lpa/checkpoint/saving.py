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
from typing import Any, TypeVar

import safetensors
import torch

import megatron_lpa
from megatron_lpa.checkpoint.manifest import FORMAT, STATE_FORMAT, WrittenFile, sealed, size_of
from megatron_lpa.checkpoint.progress import (
    AT_START,
    NOTHING_UNRECORDED,
    Decisions,
    Progress,
    SampleOrder,
    Unrecorded,
    due_at,
)
from megatron_lpa.checkpoint.store import Retention, check_free_space, partial_of, prune, publish, remove
from megatron_lpa.checkpoint.tensor_file import fragment_key, shard_name, write_tensors, write_weights
from megatron_lpa.checkpoint.training_state import KINDS, MASTER, TrainingState
from megatron_lpa.errors import UserError
from megatron_lpa.files import patiently
from megatron_lpa.parallel.agreement import gather_json, gather_messages, largest_of_all
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.run_folder import checkpoint_name

Result = TypeVar("Result")
Tensors = list[tuple[str, torch.Tensor]]
Weights = Iterable[tuple[str, torch.Tensor | None]]

KEEP_ALL = Retention()


class CheckpointNotWritten(UserError):
    """A checkpoint could not be written; the earlier ones are untouched, and training could go on."""


@dataclasses.dataclass(eq=False)
class PendingCheckpoint:
    """A checkpoint on its way, as ``begin_save`` returns it; every rank has one.

    Args:
        final: the folder that it becomes.
        progress: how far the run had come when it was begun.
        groups: all ranks take part.
        retention: which earlier checkpoints stay.
        content: the manifest, but for the files.
        blocked_s: seconds that training waited so far; of one that was written at once all but agreeing and
            renaming.
    """

    final: Path
    progress: Progress
    groups: ParallelGroups
    retention: Retention
    content: dict[str, Any]
    blocked_s: float = 0.0
    _files: list[WrittenFile] = dataclasses.field(default_factory=list)
    _failure: Exception | None = None
    _thread: threading.Thread | None = None

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
        started, groups = time.perf_counter(), self.groups
        if self._thread is not None:
            self._thread.join()
        partial = partial_of(self.final)
        with _nothing_half_written(partial, groups):
            own = _guarded(self._outcome, groups)
            gathered = gather_json([dataclasses.asdict(file) for file in own], groups)
            files = [WrittenFile(**described) for of_rank in gathered for described in of_rank]

            def publish_it() -> None:
                if groups.rank == 0:
                    _check_shared(partial, files)
                    listed = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files}
                    publish(self.final, json.dumps(sealed({**self.content, "files": listed}), indent=1))

            _guarded(publish_it, groups)
        if groups.rank == 0:
            prune(self.final.parent, self.retention)
        self.blocked_s += time.perf_counter() - started
        return self.final

    def _write_at_once(self, tensors: Tensors, weights: Weights) -> None:
        self._write(tensors, weights)
        _guarded(self._outcome, self.groups)

    def _write_beside(self, tensors: Tensors, weights: Weights) -> None:
        """Copy all, which is what training waits for, and leave the rest to a thread that takes no part in
        collectives."""
        copied: tuple[Tensors, list[tuple[str, torch.Tensor | None]]] = ([], [])

        def copy() -> None:
            copied[1].extend(_copied(weights))  # first: it takes collectives, which no rank may miss
            copied[0].extend((key, tensor.to("cpu", copy=True)) for key, tensor in tensors)

        _guarded(copy, self.groups)  # memory may be short on one rank alone
        thread = threading.Thread(target=self._write, args=copied, daemon=True)
        self._thread = thread
        thread.start()

    def _write(self, tensors: Tensors, weights: Weights) -> None:
        partial = partial_of(self.final)
        own: list[WrittenFile] = []
        try:
            own.append(write_tensors(partial, f"state/rank_{self.groups.rank:05d}.safetensors", tensors))
        except Exception as error:
            self._failure = error
        try:  # also after a failure: the weights may be on their way here through collectives
            for file in write_weights(weights, partial / "weights"):
                own.append(dataclasses.replace(file, name=f"weights/{file.name}"))
        except Exception as error:
            self._failure = self._failure or error
        self._files = own

    def _outcome(self) -> list[WrittenFile]:
        if isinstance(self._failure, (OSError, RuntimeError, UserError)):
            raise self._failure
        # A bug: in a thread it must not go unseen, nor leave other ranks waiting.
        if self._failure is not None:
            traceback.print_exception(self._failure)
            raise RuntimeError(f"{type(self._failure).__name__}: {self._failure}")
        return self._files


def begin_save(
    state: TrainingState,
    folder: Path,
    progress: Progress,
    order: SampleOrder,
    retention: Retention = KEEP_ALL,
    validation_loss: float | None = None,
    overlap: bool = False,
    decisions: Decisions = AT_START,
    unrecorded: Unrecorded = NOTHING_UNRECORDED,
    evaluates: Mapping[str, bool] | None = None,
) -> PendingCheckpoint:
    """Begin a checkpoint, and return as soon as training may go on. Every rank calls it.

    With ``overlap`` the state is copied to the CPU's memory, which is all that training waits for, and
    written by a thread. Without it nothing is copied and everything is written before this returns.

    Args:
        state: what to save.
        folder: the run's ``checkpoints`` folder, on a file system all ranks share.
        progress: goes into the manifest.
        order: what the order of samples depends on; a resumed run must have the same.
        retention: which earlier checkpoints stay.
        validation_loss: of exactly these weights; rank 0's counts. None when validation did not run here.
        overlap: write beside training.
        decisions: what decides, as of this step, whether the run goes back; goes into the manifest.
        unrecorded: losses since the last training record; goes into the manifest.
        evaluates: whether the run has a validation and a test of its own: ``{"valid": True, "test": False}``;
            goes into the manifest, for those that have not its data at hand.

    Raises:
        CheckpointNotWritten: on every rank when any rank could not write; nothing half-written stays.
    """
    started, groups = time.perf_counter(), state.groups
    state.settle()
    step = largest_of_all(state.optimizer_step(), groups)
    kinds = KINDS if step else (MASTER,)
    # Made now, as the counts that it holds move on with training.
    content = _manifest(state, progress, order, step, validation_loss, decisions, unrecorded)
    if evaluates is not None:
        content["evaluates"] = dict(evaluates)
    pending = PendingCheckpoint(folder / checkpoint_name(progress.step), progress, groups, retention, content)
    partial = partial_of(pending.final)
    needed_bytes = (4 * len(kinds) + state.weight_bytes) * sum(
        math.prod(s.shape) for s in state.specs.values()
    )
    with _nothing_half_written(partial, groups):
        _guarded(lambda: _make_folders(partial, needed_bytes) if groups.rank == 0 else None, groups)
        write = pending._write_beside if overlap else pending._write_at_once
        write(_own_tensors(state, kinds), state.gathered_weights())
    pending.blocked_s = time.perf_counter() - started
    return pending


def layout_of(state: TrainingState) -> dict[str, Any]:
    """How a state is spread."""
    return {
        "tensor_parallel_size": state.groups.tp_size,
        "data_parallel_size": state.groups.dp_size,
        "lowdim_layout": state.config.parallel.lowdim_layout,
        "zero_stage": state.zero_stage,
        "precision": state.config.train.precision,
        "micro_batch_size": state.config.train.micro_batch_size,
    }


def _guarded(work: Callable[[], Result], groups: ParallelGroups) -> Result:
    """Run ``work`` on every rank; fail together if any rank failed."""
    done: list[Result] = []
    failure = None
    try:
        done.append(work())
    except (OSError, RuntimeError, UserError) as error:
        failure = str(error)
    failures = gather_messages(failure, groups)
    if failures:
        raise CheckpointNotWritten(
            f"the checkpoint could not be written: {failures}; free disk space or choose another "
            "logging.run_dir; the newest complete checkpoint is untouched"
        )
    return done[0]


@contextlib.contextmanager
def _nothing_half_written(partial: Path, groups: ParallelGroups) -> Iterator[None]:
    try:
        yield
    except CheckpointNotWritten:
        if groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_folders(partial: Path, needed_bytes: int) -> None:
    partial.parent.mkdir(exist_ok=True)
    remove(partial)
    check_free_space(partial.parent, needed_bytes)
    partial.mkdir()


def _own_tensors(state: TrainingState, kinds: Sequence[str]) -> Tensors:
    """What this process writes of the state: its share of each fragment, a view."""
    groups = state.groups
    tensors = []
    for fragment in state.fragments():
        # The copies divide it.
        first, end = (
            fragment.length * part // fragment.copies for part in (fragment.copy, fragment.copy + 1)
        )
        if first == end:
            continue
        shard = shard_name(fragment.spec.tp_dim, groups.tp_rank, groups.tp_size)
        for kind in kinds:
            key = fragment_key(fragment.name, kind, shard, fragment.start + first)
            tensors.append((key, fragment.view(kind)[first:end]))
    return tensors


def _copied(weights: Weights) -> list[tuple[str, torch.Tensor | None]]:
    """All of them, on the CPU. Where memory is short, other ranks are not left waiting in a collective.

    Raises:
        RuntimeError: the CPU's memory of rank 0 is too small, there alone.
    """
    copies: list[tuple[str, torch.Tensor | None]] = []
    failure: RuntimeError | None = None
    for name, full in weights:
        if failure is None:
            try:
                copies.append((name, None if full is None else full.cpu()))
            except RuntimeError as error:
                failure = error
                copies.clear()
    if failure is not None:
        raise failure
    return copies


def _check_shared(partial: Path, files: Sequence[WrittenFile]) -> None:
    for file in files:
        path = partial / file.name
        if patiently(functools.partial(size_of, path), path) != file.bytes:
            raise OSError(
                f"{path}: written by another process but not seen here; all machines need one file system"
            )


def _manifest(
    state: TrainingState,
    progress: Progress,
    order: SampleOrder,
    step: int,
    validation_loss: float | None,
    decisions: Decisions,
    unrecorded: Unrecorded,
) -> dict[str, Any]:
    if validation_loss is not None and not math.isfinite(validation_loss):
        validation_loss = None  # JSON cannot hold it
    return {
        "format": FORMAT,
        "versions": {
            "megatron_lpa": megatron_lpa.__version__,
            "torch": torch.__version__,
            **state.versions,
            "safetensors": safetensors.__version__,
        },
        "progress": dataclasses.asdict(progress),
        "validation_loss": validation_loss,
        "decisions": dataclasses.asdict(decisions),
        "unrecorded": dataclasses.asdict(unrecorded),
        "at_interval": due_at(progress.step, state.config.train.checkpoint_interval),
        "layout": layout_of(state),
        "order": dataclasses.asdict(order),
        "model": dataclasses.asdict(state.config.model),
        "config": dataclasses.asdict(state.config),
        "state": {
            "format": STATE_FORMAT,
            "optimizer": "AdamW",
            "optimizer_step": step,
            "skipped_steps": state.skipped_steps(),
            "parameters": {n: {"shape": list(s.shape), "tp_dim": s.tp_dim} for n, s in state.specs.items()},
        },
    }
