"""Going back to the newest checkpoint inside a run, past the data at which it went wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lpa.engine.manifest import MANIFEST, checkpoint_folders
from megatron_lpa.engine.resume import Resumed, load_newest
from megatron_lpa.errors import UserError
from megatron_lpa.files import write_whole
from megatron_lpa.parallel.agreement import gather_messages, together
from megatron_lpa.run_folder import PASSED_OVER
from megatron_lpa.train.state import Run

DIVERGED = (
    "training has diverged; lower optim.lr, raise optim.warmup_steps, or continue from an earlier checkpoint"
)


def roll_back(run: Run, reason: str) -> Resumed:
    """Replace the state by the newest checkpoint's; the data since then is passed over. Every rank calls it.

    Returns:
        What the run continues from.

    Raises:
        UserError: on all ranks: there is no checkpoint, or ``train.max_rollbacks`` is used up.
    """
    groups, bad = run.engine.groups, run.progress
    chosen = [checkpoint_folders(run.checkpoints) if groups.rank == 0 else []]
    if groups.control_group is not None:
        dist.broadcast_object_list(chosen, src=0, group=groups.control_group)
    at = f"step {bad.step}: {reason}"
    if not chosen[0]:
        raise UserError(f"{at}, and there is no checkpoint to go back to: {DIVERGED}")
    run.rollbacks += 1
    limit = run.config.train.max_rollbacks
    if run.rollbacks > limit:
        raise UserError(f"{at}, after going back {limit} times (train.max_rollbacks): {DIVERGED}")
    resumed = load_newest(run.engine, chosen[0], run.order)
    # The order of samples goes on where the bad step ended, so that its data is not read again.
    skipped = bad.position - resumed.progress.consumed_samples
    run.progress = dataclasses.replace(resumed.progress, skipped_samples=skipped)
    run.saved_step = resumed.progress.step
    forgotten = gather_messages(_remember(run) if run.is_main else None, groups)
    return dataclasses.replace(resumed, notes=(*resumed.notes, forgotten)) if forgotten else resumed


def _remember(run: Run) -> str | None:
    """Bring to disk what was passed over: until the next checkpoint no manifest has it, and the run may be killed.

    Returns:
        Why it could not be written, as on a full disk: nothing that a run has to end for.
    """
    if run.lock is not None and not run.lock.still_held():  # another run may be writing there
        return None
    path = run.checkpoints / PASSED_OVER
    try:
        _write(path, run)
    except OSError as error:
        return f"{path} cannot be written ({error}): a start before the next checkpoint would read the bad data again"
    return None


def _write(path: Path, run: Run) -> None:
    content = {
        "step": run.progress.step,
        "checkpoint": _checksum(run),
        "skipped_samples": run.progress.skipped_samples,
        "rollbacks": run.rollbacks,
    }
    write_whole(path, json.dumps(content))


def recall(run: Run) -> None:
    """Go on as after going back, if the run was ended before its next checkpoint. Every rank calls it.

    The data passed over counts for the checkpoint that the run went back to, and for no other: a later one has it in
    its manifest, and before it the data has to be read. How often the run has gone back counts from there on.

    Raises:
        UserError: on all ranks: the file is not what ``roll_back`` wrote.
        TryAgain: on all ranks: the disk does not give it.
    """
    groups = run.engine.groups
    chosen: list[Any] = [together(lambda: _remembered(run) if run.is_main else None, groups)]
    if groups.control_group is not None:
        dist.broadcast_object_list(chosen, src=0, group=groups.control_group)
    if chosen[0] is not None:
        skipped, run.rollbacks = chosen[0]
        run.progress = dataclasses.replace(run.progress, skipped_samples=skipped)


def _remembered(run: Run) -> tuple[int, int] | None:
    """Samples passed over and times gone back, for the checkpoint that the run goes on from; None without any."""
    path = run.checkpoints / PASSED_OVER
    try:
        content = json.loads(path.read_text())
        step, skipped, rollbacks = (int(content[key]) for key in ("step", "skipped_samples", "rollbacks"))
        checkpoint = str(content["checkpoint"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not what was written when the run went back to a checkpoint: {error!r}; remove it, and the data that "
            "was passed over then is read again"
        ) from error
    if run.saved_step < step:  # another run of that name, or one that was taken back further by hand
        return None
    if run.saved_step == step and _checksum(run) == checkpoint:
        return skipped, rollbacks
    return run.progress.skipped_samples, rollbacks


def _checksum(run: Run) -> str:
    """What tells the checkpoint that the run goes on from from another one of the same step."""
    manifest = run.checkpoints / f"step_{run.saved_step:08d}" / MANIFEST
    return str(json.loads(manifest.read_text())["checksum"])
