"""Whether a run has anything left to do. Only looks: a start that has nothing to do changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lpa.config import RunConfig
from megatron_lpa.config.compare import listed
from megatron_lpa.data.splits import Splits
from megatron_lpa.engine.manifest import DamagedCheckpoint, SampleOrder, complete_checkpoints, read_manifest
from megatron_lpa.engine.resume import refuse_other_run
from megatron_lpa.errors import UserError
from megatron_lpa.records import NoRecord, read_lines
from megatron_lpa.run_folder import CHECKPOINTS, METRICS
from megatron_lpa.train.callbacks.evaluation import is_due
from megatron_lpa.train.changes import changed_settings, settings_of
from megatron_lpa.train.schedule import total_steps

_DECIDE = ("optim.", "train.precision")
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
        UserError: the folder holds a run of another model or order of samples; more steps are trained than this start
            asks for; or the run is complete, and was trained with other settings than these.
        TryAgain: the disk does not give a file.
    """
    try:
        newest = complete_checkpoints(folder / CHECKPOINTS)[-1:]
        manifest = read_manifest(newest[0]) if newest else None
    except DamagedCheckpoint:
        return None
    if manifest is None:
        return None
    refuse_other_run(newest[0], manifest, config.model, order)
    if manifest["progress"].step < steps:
        return None
    name, step = newest[0].name, manifest["progress"].step
    earlier = settings_of(manifest["config"], name)
    changed = [] if earlier is None else changed_settings(earlier, config)
    decisive = [line for line in changed if line.startswith(_DECIDE)]
    further = f"To train it further, ask for more than {step} steps; to train with other settings, choose another logging.name"
    if step > steps:
        planned = total_steps(earlier.train, earlier.model, order.samples_per_epoch) if earlier else step
        has = "is complete: all" if step >= planned else "is not complete, but"
        raise UserError(
            f"{folder} {has} {step:,} steps are trained ({name}), more than the {steps:,} asked for. Nothing was trained, "
            f"and nothing in the folder was changed. {further}"
        )
    loss = _losses(folder / METRICS, step)
    wanted = {
        "valid": splits.valid is not None and is_due(config.train, step, steps),
        "test": splits.test is not None,
    }
    if any(wanted[kind] and kind not in loss for kind in wanted):
        if decisive:
            raise UserError(
                f"{folder} has trained all {step} steps ({name}), but with other settings: {listed(decisive)}. Nothing was "
                "changed; start it with the settings it was trained with for its last evaluation, or choose another "
                "logging.name"
            )
        return None
    if decisive:
        raise UserError(
            f"{folder} is complete: all {step} steps are trained ({name}), but with other settings than these: "
            f"{listed(decisive)}. Nothing was trained with these, and nothing in the folder was changed. {further}"
        )
    kept = f" (not used now: {listed(changed)})" if changed else ""
    results = "".join(f", {kind} loss {value}" for kind, value in loss.items())
    return (
        f"{folder} is complete: all {step} steps are trained ({name}{results}); nothing is left to do, and nothing in the "
        f"folder was changed{kept}. {further}"
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
