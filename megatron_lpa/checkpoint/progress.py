"""What a run has to know of the steps before, besides weights. It is part of every checkpoint, so that no
stop changes it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

WINDOW_STEPS = 50
"""A loss is compared with the mean of so many before it."""

FEWEST_STEPS = 10
"""Before so many there is nothing to compare with."""

LARGEST = 1 << 62
"""Counts in files stay below it: sums of them fit 64 bits."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come; with the config it determines everything that follows.

    Args:
        step: optimizer steps done.
        consumed_samples: sequences read for training.
        consumed_tokens: tokens predicted in training.
        skipped_samples: samples passed over when the run went back to a checkpoint; they count as neither.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_samples: int = 0

    @property
    def position(self) -> int:
        """Where in the order of samples the next step begins."""
        return self.consumed_samples + self.skipped_samples


def due_at(step: int, interval: int) -> bool:
    """Whether a run that is never stopped has a checkpoint of this step; never without an interval."""
    return bool(interval) and step % interval == 0


@dataclass(frozen=True)
class SampleOrder:
    """What the order of training samples depends on: with it, consumed samples say which come next.

    Args:
        seed: the run's seed.
        samples_per_epoch: samples of the training split that can be read before any comes again.
        samples_per_step: the global batch size; steps, and so the length and the schedule, count in it.
        data: what tells the data from other data: hashes of contents, ranges of documents, weights; no
            paths and no dates.
    """

    seed: int
    samples_per_epoch: int
    samples_per_step: int
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decisions:
    """What decides whether a run goes back; equal on all ranks.

    Args:
        skipped_in_a_row: steps up to now that changed nothing because their gradient was not finite.
        losses: of the last steps that changed something, oldest first, in nats, at most ``WINDOW_STEPS``;
            empty with ``train.loss_spike=0``.
        rollbacks: how often the run has gone back, over all its starts.
    """

    skipped_in_a_row: int = 0
    losses: tuple[float, ...] = ()
    rollbacks: int = 0

    def after_skipped_step(self) -> Decisions:
        """One more step changed nothing; its loss is none to compare with."""
        return replace(self, skipped_in_a_row=self.skipped_in_a_row + 1)

    def after_step(self, loss: float | None) -> Decisions:
        """A step was trained. A ``loss`` of None, or one that is not finite, is not compared with later."""
        losses = self.losses if loss is None or not math.isfinite(loss) else (*self.losses, loss)
        return replace(self, skipped_in_a_row=0, losses=losses[-WINDOW_STEPS:])

    def mean_loss(self) -> float | None:
        """What a loss is compared with; None while too few are known."""
        return sum(self.losses) / len(self.losses) if len(self.losses) >= FEWEST_STEPS else None

    def after_going_back(self, checkpoint: Decisions) -> Decisions:
        """What counts after a bad step led back to a checkpoint.

        The losses are the checkpoint's, not those before the bad step: they are what its weights gave. Early
        in training the later ones can be so much lower that the checkpoint's own level would pass for a
        spike, at which the run goes back again until it may not any more. Only where the checkpoint has too
        few to compare with, the ones that followed it directly complete them.

        The row of skipped steps ends here, also when the checkpoint was written in the middle of it: the data
        behind it is passed over. Each further going back then takes ``train.max_skipped_steps`` more bad
        steps and ends behind them, and ``train.max_rollbacks`` bounds how often: it counts what has happened,
        not what the checkpoint knew.

        Args:
            checkpoint: what the checkpoint was written with.
        """
        losses = checkpoint.losses
        # A window that is not full has lost nothing: it begins with what the checkpoint knew.
        if len(losses) < FEWEST_STEPS and len(self.losses) < WINDOW_STEPS:
            losses = self.losses[:FEWEST_STEPS]
        return Decisions(losses=losses, rollbacks=self.rollbacks + 1)


AT_START = Decisions()


@dataclass(frozen=True)
class Unrecorded:
    """Losses of steps that no record has yet, for the mean in the next one; equal on the ranks of a replica.

    Args:
        steps: how many there are.
        finite: how many of them have a finite loss; the others changed nothing.
        loss_sum: sum of the finite losses, in nats. Steps are added one by one in float64, so that it does
            not depend on where a run was stopped.
    """

    steps: int = 0
    finite: int = 0
    loss_sum: float = 0.0

    def and_then(self, losses: Iterable[float]) -> Unrecorded:
        """With further steps, in their order."""
        steps, finite, loss_sum = self.steps, self.finite, self.loss_sum
        for loss in losses:
            steps += 1
            if math.isfinite(loss):
                finite, loss_sum = finite + 1, loss_sum + loss
        return Unrecorded(steps, finite, loss_sum)

    def mean(self) -> float | None:
        """Mean of the finite losses, in nats; None when there are none."""
        return self.loss_sum / self.finite if self.finite else None


NOTHING_UNRECORDED = Unrecorded()


def decisions_from_json(value: Any) -> Decisions:
    """What was written as ``dataclasses.asdict`` gives it. What is missing, as in an older file, is as at the
    start.

    Raises:
        ValueError: it is not that; the message names the key.
    """
    if not isinstance(value, dict):
        raise ValueError("decisions is not an object")
    losses = value.get("losses", [])
    if not isinstance(losses, list) or not all(_is_finite(loss) for loss in losses):
        raise ValueError("decisions.losses is not a list of finite numbers")
    return Decisions(
        whole_number(value.get("skipped_in_a_row", 0), "decisions.skipped_in_a_row"),
        tuple(float(loss) for loss in losses[-WINDOW_STEPS:]),
        whole_number(value.get("rollbacks", 0), "decisions.rollbacks"),
    )


def unrecorded_from_json(value: Any) -> Unrecorded:
    """What was written as ``dataclasses.asdict`` gives it.

    Raises:
        ValueError: it is not that; the message names the key.
    """
    if not isinstance(value, dict):
        raise ValueError("unrecorded is not an object")
    steps = whole_number(value.get("steps"), "unrecorded.steps")
    finite = whole_number(value.get("finite"), "unrecorded.finite")
    loss_sum: Any = value.get("loss_sum")
    if finite > steps:
        raise ValueError("unrecorded.finite is more than unrecorded.steps")
    if type(loss_sum) not in (int, float) or not abs(loss_sum) <= sys.float_info.max:
        raise ValueError("unrecorded.loss_sum is not a finite number")
    return Unrecorded(steps, finite, float(loss_sum))


def whole_number(value: Any, key: str) -> int:
    """A count from a file.

    Raises:
        ValueError: it is no whole number of at least 0, or an absurd one.
    """
    if type(value) is not int or not 0 <= value < LARGEST:
        raise ValueError(f"{key} is not a whole number from 0 on")
    return value


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST
