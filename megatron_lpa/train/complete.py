"""Whether a run has anything left to do. Only looks: a start that has nothing to do changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lpa.checkpoint.manifest import (
    DamagedCheckpoint,
    complete_checkpoints,
    read_manifest,
    verify_files,
)
from megatron_lpa.checkpoint.progress import SampleOrder
from megatron_lpa.checkpoint.resume import Resumed, refuse_other_run
from megatron_lpa.config import RunConfig
from megatron_lpa.config.compare import listed
from megatron_lpa.data.splits import Splits
from megatron_lpa.errors import UserError
from megatron_lpa.records import NoRecord, read_lines
from megatron_lpa.run_folder import CHECKPOINTS, METRICS
from megatron_lpa.train.changes import changed_settings, settings_of
from megatron_lpa.train.schedule import is_due, total_steps

_DECIDE = ("optim.", "train.precision", "train.predict_next_block")
"""Settings that decide what a run becomes, besides its model, its order of samples and its length."""


def why_nothing_to_do(
    config: RunConfig, folder: Path, splits: Splits, order: SampleOrder, steps: int
) -> str | None:
    """What to tell a user whose run is complete: trained, validated and tested. None where something is left.

    Args:
        config: of this start.
        folder: the run folder; nothing in it is changed.
        splits: the data.
        order: what the order of training samples depends on.
        steps: of the whole run.

    Raises:
        UserError: the folder holds a run of another model or order of samples; more steps are trained than
            this start asks for; or the run is complete, and was trained with other settings than these.
        TryAgain: the disk does not give a file.
    """
    for checkpoint in reversed(complete_checkpoints(folder / CHECKPOINTS)):
        try:
            manifest = read_manifest(checkpoint)
        except DamagedCheckpoint:
            continue
        refuse_other_run(checkpoint, manifest, config.model, order)
        if manifest["progress"].step < steps:
            return None
        return _complete(config, folder, splits, checkpoint, manifest, steps)
    return None


def _complete(
    config: RunConfig, folder: Path, splits: Splits, checkpoint: Path, manifest: dict[str, Any], steps: int
) -> str | None:
    """As ``why_nothing_to_do``, of a run whose newest checkpoint has all its steps."""
    earlier = settings_of(manifest["config"], checkpoint.name)
    per_epoch = manifest["order"]["samples_per_epoch"]
    _refuse_other_end(folder, config, earlier, checkpoint.name, manifest["progress"].step, steps, per_epoch)
    losses = _losses(folder / METRICS, steps)
    wanted = {
        "valid": splits.valid is not None and is_due(config.train.eval_interval, steps, steps),
        "test": splits.test is not None,
    }
    if any(wanted[kind] and kind not in losses for kind in wanted):
        return None
    try:
        verify_files(checkpoint, manifest, manifest["files"])
    except DamagedCheckpoint:  # the start takes an earlier one, and trains what is missing
        return None
    changed = changed_settings(earlier, config) if earlier else []
    unused = f" (not used now: {listed(changed)})" if changed else ""
    results = "".join(f", {kind} loss {value}" for kind, value in losses.items())
    return (
        f"{folder} is complete: all {steps:,} steps are trained ({checkpoint.name}{results}); nothing is "
        f"left to do, and nothing in the folder was changed{unused}. {_further(steps)}"
    )


def refuse_other_end(
    folder: Path, config: RunConfig, resumed: Resumed, steps: int, samples_per_epoch: int
) -> None:
    """Refuse a start for which a checkpoint leaves no step to train, but whose settings ask for another
    model.

    Args:
        folder: the run folder.
        config: of this start.
        resumed: what it goes on from.
        steps: of the whole run.
        samples_per_epoch: of the training split.

    Raises:
        UserError: more steps are trained than are asked for, or all are, with other settings than these.
    """
    name = resumed.checkpoint.name
    earlier = settings_of(resumed.config, name)
    _refuse_other_end(folder, config, earlier, name, resumed.progress.step, steps, samples_per_epoch)


def _refuse_other_end(
    folder: Path,
    config: RunConfig,
    earlier: RunConfig | None,
    name: str,
    step: int,
    steps: int,
    per_epoch: int,
) -> None:
    if step < steps:
        return
    planned = total_steps(earlier.train, earlier.model, per_epoch) if earlier else step
    has = "is complete: all" if step >= planned else "is not complete, but"
    trained = f"{folder} {has} {step:,} steps are trained ({name})"
    if step > steps:
        problem = f"more than the {steps:,} asked for"
    elif decisive := [
        line for line in (changed_settings(earlier, config) if earlier else ()) if line.startswith(_DECIDE)
    ]:
        problem = f"but with other settings than these: {listed(decisive)}"
    else:
        return
    raise UserError(
        f"{trained}, {problem}. Nothing was trained with these settings or changed. {_further(step)}"
    )


def _further(step: int) -> str:
    return (
        f"To train it further, ask for more than {step:,} steps; to train with other settings, choose "
        "another logging.name"
    )


def _losses(metrics: Path, step: int) -> dict[str, Any]:
    """Losses of validation and test after ``step`` steps, as a run's records have them."""
    found: dict[str, Any] = {}
    try:
        for line in read_lines(metrics):
            try:
                record = line.record()
            except NoRecord:
                continue
            if record["kind"] in ("valid", "test") and record["step"] == step:
                loss = record["loss"]
                found[record["kind"]] = "not finite" if loss is None else f"{loss:.4f}"
    except (OSError, UserError):  # the start looks again, and says what is wrong
        return {}
    return found
