"""Going back to a checkpoint inside a run, past the data at which it went wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_lpa.checkpoint.progress import AT_START, Decisions, decisions_from_json, whole_number
from megatron_lpa.checkpoint.resume import Resumed, load_newest
from megatron_lpa.checkpoint.store import pass_over, retention_of, to_go_back_to
from megatron_lpa.engine.engine_state import EngineState
from megatron_lpa.errors import UserError
from megatron_lpa.files import UnusableFile, read_json, write_whole
from megatron_lpa.parallel.agreement import from_first, together
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.run_folder import PASSED_OVER
from megatron_lpa.train.state import Run

ADVICE = (
    "not what was written when the run went back to a checkpoint; remove it, and the data that was passed "
    "over then is read again"
)

DIVERGED = (
    "training has diverged; lower optim.lr, raise optim.warmup_steps, or continue from an earlier checkpoint"
)


def roll_back(run: Run, reason: str, decisions: Decisions) -> Resumed:
    """Replace the state by a checkpoint's; the data since then is passed over. Every rank calls it.

    It is the newest of those that were due at ``train.checkpoint_interval`` when they were written, which a
    run that was never stopped has as well: when a run is stopped must not decide what it becomes. Without one
    it is the newest there is. What was written after it is renamed where a rule keeps it, else removed, or
    the next start would go on from there.

    Args:
        run: at the bad step.
        reason: why, for the user.
        decisions: what the run knows of the steps before.

    Returns:
        What the run continues from, its progress and decisions as they count after going back.

    Raises:
        UserError: on all ranks: there is no checkpoint, or ``train.max_rollbacks`` is used up.
    """
    groups, bad = run.engine.groups, run.progress
    interval = run.config.train.checkpoint_interval

    def candidates() -> list[str]:
        return [path.name for path in to_go_back_to(run.checkpoints, interval)] if run.is_main else []

    names = from_first(together(candidates, groups), groups)
    at = f"step {bad.step}: {reason}"
    if not names:
        raise UserError(f"{at}, and there is no checkpoint to go back to: {DIVERGED}")
    limit = run.config.train.max_rollbacks
    if decisions.rollbacks >= limit:
        raise UserError(f"{at}, after going back {limit} times (train.max_rollbacks): {DIVERGED}")
    resumed = load_newest(EngineState(run.engine), [run.checkpoints / name for name in names], run.order)
    # The order of samples goes on where the bad step ended, so that its data is not read again.
    skipped = bad.position - resumed.progress.consumed_samples
    resumed = dataclasses.replace(
        resumed,
        progress=dataclasses.replace(resumed.progress, skipped_samples=skipped),
        decisions=decisions.after_going_back(resumed.decisions or AT_START),
    )
    notes = from_first(together(lambda: _settle(run, resumed) if run.is_main else [], groups), groups)
    return dataclasses.replace(resumed, notes=(*resumed.notes, *notes))


def _settle(run: Run, resumed: Resumed) -> list[str]:
    """Make the next start go on from here, should the run be killed before its next checkpoint.

    Returns:
        For the user: what was renamed or removed, and what could not be done, as on a full disk: nothing that
        a run has to end for.
    """
    if run.lock is not None and not run.lock.still_held():  # another run may be writing there
        return []
    path, step = run.checkpoints / PASSED_OVER, resumed.progress.step
    content = {
        "step": step,
        "checkpoint": resumed.seal,
        "skipped_samples": resumed.progress.skipped_samples,
        "decisions": dataclasses.asdict(resumed.decisions or AT_START),
    }
    notes = []
    try:
        write_whole(path, json.dumps(content))
    except OSError as error:
        notes.append(
            f"{path} cannot be written ({error}): a start before the next checkpoint would read the bad data "
            "again"
        )
    try:
        notes.extend(pass_over(run.checkpoints, step, retention_of(run.config.train)))
    except (OSError, UserError) as error:
        notes.append(f"{run.checkpoints}: {error}: the next start may have to go back again")
    return notes


def recall(resumed: Resumed, groups: ParallelGroups) -> Resumed:
    """What the run goes on from as it decided when it was ended: at this checkpoint, or having gone back to
    it.

    Data passed over, and what decides after going back, count for the checkpoint that the run went back to,
    and for no other: a later one has both in its manifest, and before it the data has to be read. Every rank
    calls it.

    Raises:
        UserError: on all ranks: the file is not what ``roll_back`` wrote.
        TryAgain: on all ranks: the disk does not give it.
    """
    path = resumed.checkpoint.parent / PASSED_OVER
    own = together(lambda: _recalled(path, resumed) if groups.rank == 0 else None, groups)
    skipped, decisions = from_first(own, groups)
    progress = dataclasses.replace(resumed.progress, skipped_samples=skipped)
    return dataclasses.replace(resumed, progress=progress, decisions=decisions_from_json(decisions))


def _recalled(path: Path, resumed: Resumed) -> tuple[int, dict[str, Any]]:
    """Samples passed over and ``Decisions``, for the checkpoint that the run goes on from."""
    skipped, decisions = resumed.progress.skipped_samples, resumed.decisions or AT_START
    remembered = _remembered(path)
    if remembered is not None:
        step, seal, passed_over, then = remembered
        if step == resumed.progress.step and seal in (resumed.seal, resumed.checksum):
            skipped, decisions = passed_over, then
        elif resumed.decisions is None and step <= resumed.progress.step:  # of a version without decisions
            decisions = Decisions(rollbacks=then.rollbacks)
    return skipped, dataclasses.asdict(decisions)


def check_passed_over(checkpoints: Path) -> None:
    """Make sure that what an earlier start remembered can be used, before a start changes anything.

    Raises:
        UserError: the file is not what ``roll_back`` wrote.
        TryAgain: the disk does not give it.
    """
    _remembered(checkpoints / PASSED_OVER)


def _remembered(path: Path) -> tuple[int, str, int, Decisions] | None:
    """Step and hash of the checkpoint that a run went back to, samples passed over, ``Decisions``; None if it
    never did."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give this user access to it") from error
    except UnusableFile as error:
        raise UserError(f"{error}: {ADVICE}") from error
    try:
        if not isinstance(content, dict):
            raise ValueError("not an object")
        # An earlier version knew how often the run had gone back, and no more.
        decisions = content.get("decisions", {"rollbacks": content.get("rollbacks")})
        return (
            whole_number(content.get("step"), "step"),
            str(content.get("checkpoint")),
            whole_number(content.get("skipped_samples"), "skipped_samples"),
            decisions_from_json(decisions),
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}: {ADVICE}") from error
