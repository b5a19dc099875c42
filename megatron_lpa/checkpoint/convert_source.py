"""The checkpoint that a conversion reads: found, compared with its hashes, and read in any layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lpa.checkpoint.manifest import (
    DamagedCheckpoint,
    checkpoint_folders,
    read_manifest,
    verify_files,
)
from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.checkpoint.reshard import StateReader, shard_box
from megatron_lpa.checkpoint.training_state import KINDS, MASTER
from megatron_lpa.config import ModelConfig, ProjectionConfig, ProjectionsConfig
from megatron_lpa.errors import UserError
from megatron_lpa.files import is_dir
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import spec_of
from megatron_lpa.run_folder import CHECKPOINTS, MANIFEST, step_of


@dataclass(frozen=True)
class Parameter:
    """A parameter of the saved model.

    Args:
        name: its name in the model and in files.
        shape: unsharded, with the vocabulary padding that it was saved with.
        tp_dim: dimension that tensor parallelism splits; None where every rank holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Source:
    """A checkpoint, every file of which has been compared with its hash.

    Args:
        checkpoint: the folder.
        manifest: what ``read_manifest`` returned.
        notes: for the user: newer checkpoints that are damaged and were passed over.
    """

    checkpoint: Path
    manifest: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def progress(self) -> Progress:
        """How far the run had come."""
        progress: Progress = self.manifest["progress"]
        return progress

    @property
    def optimizer_step(self) -> int:
        """AdamW's count of steps; 0 where it has no moments yet."""
        step: int = self.manifest["state"]["optimizer_step"]
        return step

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the state holds of every parameter."""
        return KINDS if self.optimizer_step else (MASTER,)

    def open_state(self) -> SourceState:
        """Its masters and moments.

        Raises:
            DamagedCheckpoint: unreadable files.
        """
        return SourceState(StateReader.open(self.checkpoint, self.manifest))

    def parameters(self, lowdim_layout: str) -> list[Parameter]:
        """All parameters in the model's order, split as ``lowdim_layout`` splits them.

        Built without memory for the weights: the model itself knows what it splits.
        """
        saved = {
            n: tuple(described["shape"]) for n, described in self.manifest["state"]["parameters"].items()
        }
        model = _model_of(self)
        found: list[Parameter] = []
        if model.num_layers <= len(saved):  # else it would be long in the making
            with torch.device("meta"):
                decoder = _decoder_of(self, model, lowdim_layout)
            found = [
                Parameter(name, spec_of(value).shape, spec_of(value).tp_dim)
                for name, value in named_parameters_once(decoder)
            ]
        if {p.name: p.shape for p in found} != saved:
            raise UserError(
                f"{self.checkpoint / MANIFEST}: its parameters are not those that this version builds for "
                "its model; convert with the version that wrote it"
            )
        return found


@dataclass(frozen=True)
class SourceState:
    """The state of a source, read one range at a time.

    Args:
        reader: of its fragments.
    """

    reader: StateReader

    def shard(
        self, parameter: Parameter, kind: str, tp_rank: int, tp_size: int, start: int, end: int
    ) -> torch.Tensor:
        """(end - start,) fp32: elements ``start`` to ``end`` of the flattened shard of one tensor-parallel
        rank.

        Raises:
            DamagedCheckpoint: an element is in no file.
        """
        box = shard_box(parameter.shape, parameter.tp_dim, tp_rank, tp_size)
        return self.reader.read(parameter.name, kind, box, start, end - start)

    def whole(self, parameter: Parameter, kind: str) -> torch.Tensor:
        """``parameter.shape``, fp32 and with memory of its own.

        Raises:
            DamagedCheckpoint: an element is in no file.
        """
        return self.shard(parameter, kind, 0, 1, 0, parameter.elements).clone().view(parameter.shape)


def find_source(path: Path, step: int | None = None) -> Source:
    """Open a checkpoint folder, or a checkpoint of a run folder, and compare all its files with their hashes.

    Args:
        path: a checkpoint, or a run folder.
        step: which checkpoint of a run; None takes the newest that is not damaged.

    Raises:
        DamagedCheckpoint: the checkpoint that was asked for is damaged; the message names the file.
        UserError: no such folder or step, no intact checkpoint, or one of another version.
        TryAgain: the disk does not give a file; no older checkpoint is taken for that.
    """
    if not is_dir(path):
        raise UserError(f"{path}: no such folder; give a checkpoint, or a run folder such as runs/tiny-lpa")
    if not is_dir(path / CHECKPOINTS):
        if step is not None:
            raise UserError(f"{path} is not a run folder: leave --step out, or give the folder of the run")
        return _verified(path)
    folders = checkpoint_folders(path / CHECKPOINTS)
    if step is not None:
        of_step = [folder for folder in folders if step_of(folder) == step]
        if not of_step:
            steps = ", ".join(str(step_of(folder)) for folder in folders) or "none"
            raise UserError(f"{path} holds no complete checkpoint of step {step}; it has: {steps}")
        return _verified(of_step[0])
    passed_over: list[str] = []
    for folder in reversed(folders):
        try:
            found = _verified(folder)
        except DamagedCheckpoint as error:
            passed_over.append(f"{folder.name} was passed over: {error}")
            continue
        return Source(found.checkpoint, found.manifest, tuple(passed_over))
    raise UserError(
        "; ".join([f"{path}/checkpoints holds no complete checkpoint that is intact", *passed_over])
    )


def _verified(checkpoint: Path) -> Source:
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest, manifest["files"])
    return Source(checkpoint, manifest)


def _decoder_of(source: Source, model: ModelConfig, lowdim_layout: str) -> Decoder:
    """The saved model; whatever its settings do to what builds it is the manifest's fault."""
    try:
        return Decoder(model, ParallelGroups.single(), lowdim_layout)
    except Exception as error:
        raise UserError(
            f"{source.checkpoint / MANIFEST}: its model cannot be built: "
            f"{str(error)[:200] or type(error).__name__}; convert with the version that wrote it"
        ) from error


def _model_of(source: Source) -> ModelConfig:
    described = dict(source.manifest["model"])
    try:
        projections = {name: ProjectionConfig(**value) for name, value in described["projections"].items()}
        return ModelConfig(**{**described, "projections": ProjectionsConfig(**projections)})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{source.checkpoint / MANIFEST}: the model has other settings than this version knows: "
            f"{str(error)[:200]}; convert with the version that wrote it"
        ) from error
