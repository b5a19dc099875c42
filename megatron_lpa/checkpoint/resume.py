"""Continuing from checkpoints: verified, from the newest that is intact, in whatever layout the run has
now."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_lpa.checkpoint.manifest import (
    DamagedCheckpoint,
    layout_in,
    read_manifest,
    seal_of,
    verify_files,
)
from megatron_lpa.checkpoint.progress import (
    NOTHING_UNRECORDED,
    Decisions,
    Progress,
    SampleOrder,
    Unrecorded,
    decisions_from_json,
    unrecorded_from_json,
)
from megatron_lpa.checkpoint.reshard import StateReader, shard_box
from megatron_lpa.checkpoint.saving import layout_of
from megatron_lpa.checkpoint.store import Retention, prune, retention_of, set_aside
from megatron_lpa.checkpoint.training_state import KINDS, MASTER, TrainingState
from megatron_lpa.config import ModelConfig
from megatron_lpa.config.compare import completed, differences, listed
from megatron_lpa.errors import UserError
from megatron_lpa.parallel.agreement import gather_messages, together
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.run_folder import MANIFEST

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What a run continues from.

    Args:
        checkpoint: the folder.
        progress: how far it had come.
        seal: what tells it from any other checkpoint of the same step.
        decisions: what decides whether the run goes back; None in checkpoints of versions that did not save
            it.
        unrecorded: losses since the last training record; none in checkpoints of versions that did not save
            them.
        config: what it was trained with, as ``dataclasses.asdict`` gives it; empty where the manifest does
            not say.
        notes: for the user: checkpoints that were skipped, and a layout that changed.
        checksum: of its manifest as it is; earlier versions took it for the seal.
    """

    checkpoint: Path
    progress: Progress
    seal: str
    decisions: Decisions | None = None
    unrecorded: Unrecorded = NOTHING_UNRECORDED
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    checksum: str = ""


def load_newest(
    state: TrainingState,
    checkpoints: Sequence[Path],
    order: SampleOrder,
    accept: Callable[[Resumed], None] = lambda resumed: None,
) -> Resumed:
    """Continue from the newest checkpoint that is not damaged; every rank calls it.

    Once an intact one has been loaded, damaged ones are renamed, with a note inside, and those go that the
    run's retention does not keep: a process that was killed right after a save has left one more.

    Args:
        state: a new one, or one that is to be replaced.
        checkpoints: oldest first; the same on every rank, and not empty.
        order: what the order of samples depends on.
        accept: raises, on all ranks, where the run must not go on from the one that was loaded; before any is
            renamed or removed.

    Raises:
        UserError: all are damaged, or the newest intact one is of another model or order.
        TryAgain: the disk does not give one that may well be intact. None is renamed or passed over for that:
            an older one would take its place, and training since then would be lost.
    """
    skipped: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints):
        try:
            resumed = load_checkpoint(state, checkpoint, order)
        except DamagedCheckpoint as error:
            skipped.append((checkpoint, str(error)))
            continue
        accept(resumed)
        notes = tuple(f"{path.name} was skipped: {reason}" for path, reason in skipped)
        if state.groups.rank == 0:
            _keep_house(checkpoint, skipped, retention_of(state.config.train))
        return dataclasses.replace(resumed, notes=notes + resumed.notes)
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
    raise UserError(
        f"{checkpoints[-1].parent} holds no checkpoint that is intact: {reasons}. Bring one back from a "
        "copy, or start anew under another logging.name"
    )


def _keep_house(loaded: Path, skipped: Sequence[tuple[Path, str]], retention: Retention) -> None:
    """Rename what was found damaged, and remove what a killed process would have, now that one is known to be
    whole."""
    renamed = True
    for path, reason in skipped:
        try:
            set_aside(path, reason)
        except (OSError, UserError) as error:
            renamed = False
            logger.warning(f"{path} cannot be renamed: {error}")
    if renamed:  # else the damaged one would count as the newest, and the intact one could go
        prune(loaded.parent, retention)


def load_checkpoint(state: TrainingState, checkpoint: Path, order: SampleOrder) -> Resumed:
    """Continue from a checkpoint of the same model and sample order, in any layout; every rank calls it.

    Raises:
        DamagedCheckpoint: on every rank, with the files that any rank found damaged.
        UserError: another model or order; the message lists what differs.
    """
    groups = state.groups
    found: list[dict[str, Any]] = []

    def verify() -> None:
        """Each rank compares its part of all files with their hashes."""
        manifest = read_manifest(checkpoint)
        verify_files(checkpoint, manifest, sorted(manifest["files"])[groups.rank :: groups.world_size])
        found.append(manifest)

    _undamaged(verify, groups)
    (manifest,) = found
    notes = together(lambda: _compared(checkpoint, manifest, state, order), groups)
    state.before_restoring()
    _undamaged(lambda: _restore(state, checkpoint, manifest), groups)
    progress: Progress = manifest["progress"]
    state.after_restoring(progress.step, progress.consumed_samples, manifest["state"]["skipped_steps"])
    decisions = decisions_from_json(manifest["decisions"]) if "decisions" in manifest else None
    unrecorded = (
        unrecorded_from_json(manifest["unrecorded"]) if "unrecorded" in manifest else NOTHING_UNRECORDED
    )
    return Resumed(
        checkpoint,
        progress,
        seal_of(manifest),
        decisions,
        unrecorded,
        manifest["config"],
        notes,
        manifest["checksum"],
    )


def _undamaged(work: Callable[[], None], groups: ParallelGroups) -> None:
    """Run ``work`` on every rank; raise on all what any rank found damaged."""

    def attempt() -> str | None:
        try:
            work()
        except DamagedCheckpoint as error:
            return str(error)
        return None

    problems = gather_messages(together(attempt, groups), groups)
    if problems:
        raise DamagedCheckpoint(problems)


def refuse_other_run(
    checkpoint: Path, manifest: dict[str, Any], model_config: ModelConfig, order: SampleOrder
) -> None:
    """Make sure that a checkpoint is one that a run can go on from.

    Args:
        checkpoint: its folder, for the message.
        manifest: as ``read_manifest`` gives it.
        model_config: of the run.
        order: what the run's order of samples depends on.

    Raises:
        UserError: another model or order; the message lists what differs.
    """
    model = completed(manifest["model"], dataclasses.asdict(ModelConfig()))
    own_model = dataclasses.asdict(model_config)
    # Rows of padding are zero, whatever their number; it has to change with the tensor-parallel size.
    model["pad_vocab_to_multiple_of"] = own_model["pad_vocab_to_multiple_of"]
    sections = {"model": (model, own_model), "order": (manifest["order"], dataclasses.asdict(order))}
    for section, (saved, own) in sections.items():
        differing = differences(saved, own, section)
        if differing:
            raise UserError(
                f"{checkpoint} was written with another {section}: {listed(differing)}. Continue with the "
                "saved settings, or start a new run under another logging.name"
            )


def _compared(
    checkpoint: Path, manifest: dict[str, Any], state: TrainingState, order: SampleOrder
) -> tuple[str, ...]:
    refuse_other_run(checkpoint, manifest, state.config.model, order)
    changed = differences(layout_in(manifest), layout_of(state), "layout")
    return (f"the state is brought into another layout: {'; '.join(changed)}",) if changed else ()


def _restore(state: TrainingState, checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Overwrite this rank's masters and moments. No collective."""
    reader = StateReader.open(checkpoint, manifest)
    step: int = manifest["state"]["optimizer_step"]
    state.set_optimizer_step(step)
    groups = state.groups
    multiple = manifest["model"].get("pad_vocab_to_multiple_of", 1)
    own_model = state.config.model
    saved_model = dataclasses.replace(own_model, pad_vocab_to_multiple_of=max(multiple, 1))
    for fragment in state.fragments():
        spec = fragment.spec
        saved = reader.shape_of(fragment.name)
        padded = ((saved_model.padded_vocab_size,), (own_model.padded_vocab_size,))
        if saved != spec.shape and (saved[1:] != spec.shape[1:] or (saved[:1], spec.shape[:1]) != padded):
            raise DamagedCheckpoint(
                f"{checkpoint / MANIFEST}: {fragment.name} is of shape {saved}, in its model of {spec.shape}"
            )
        box = shard_box(spec.shape, spec.tp_dim, groups.tp_rank, groups.tp_size)
        for kind in KINDS if step else (MASTER,):
            value = reader.read(fragment.name, kind, box, fragment.start, fragment.length)
            fragment.view(kind).copy_(value)
