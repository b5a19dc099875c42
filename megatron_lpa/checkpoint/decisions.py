"""What decides whether a run goes back. It is part of every checkpoint, so that no stop changes a decision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

WINDOW_STEPS = 50
"""A loss is compared with the mean of so many before it."""

FEWEST_STEPS = 10
"""Before so many there is nothing to compare with."""

LARGEST = 1 << 62
"""Counts in files stay below it: sums of them fit 64 bits."""


@dataclass(frozen=True)
class Decisions:
    """What a run has to know of the steps before, besides weights and data; equal on all ranks.

    Args:
        skipped_in_a_row: steps up to now that changed nothing because their gradient was not finite.
        losses: of the last steps that changed something, oldest first, in nats, at most ``WINDOW_STEPS``; empty
            with ``train.loss_spike=0``.
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

        The losses are the checkpoint's, not those before the bad step: they are what its weights gave. Early in training
        the later ones can be so much lower that the checkpoint's own level would pass for a spike, at which the run
        goes back again until it may not any more. Only where the checkpoint has too few to compare with, the ones that
        followed it directly complete them.

        The row of skipped steps ends here, also when the checkpoint was written in the middle of it: the data behind it
        is passed over. Each further going back then takes ``train.max_skipped_steps`` more bad steps and ends behind
        them, and ``train.max_rollbacks`` bounds how often: it counts what has happened, not what the checkpoint knew.

        Args:
            checkpoint: what the checkpoint was written with.
        """
        losses = checkpoint.losses
        # A window that is not full has lost nothing: it begins with what the checkpoint knew.
        if len(losses) < FEWEST_STEPS and len(self.losses) < WINDOW_STEPS:
            losses = self.losses[:FEWEST_STEPS]
        return Decisions(losses=losses, rollbacks=self.rollbacks + 1)


AT_START = Decisions()


def decisions_from_json(value: Any) -> Decisions:
    """What was written as ``dataclasses.asdict`` gives it. What is missing, as in an older file, is as at the start.

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
