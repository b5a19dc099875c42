"""Going back to the newest checkpoint inside a run, past the data at which it went wrong."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist

from megatron_lpa.engine.manifest import checkpoint_folders
from megatron_lpa.engine.resume import Resumed, load_newest
from megatron_lpa.errors import UserError
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
    return resumed
