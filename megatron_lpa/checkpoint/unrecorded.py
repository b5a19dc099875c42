"""Losses of steps that no record has yet. They are part of every checkpoint, so that no stop changes a mean."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_lpa.checkpoint.decisions import whole_number
from megatron_lpa.records import is_finite_number


@dataclass(frozen=True)
class Unrecorded:
    """What the next training record has to know of the steps since the last one; equal on the ranks of a replica.

    Args:
        steps: how many there are.
        finite: how many of them have a finite loss; the others changed nothing.
        loss_sum: sum of the finite losses, in nats. Steps are added one by one in float64, so that it does not depend
            on where a run was stopped.
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


def unrecorded_from_json(value: Any) -> Unrecorded:
    """What was written as ``dataclasses.asdict`` gives it.

    Raises:
        ValueError: it is not that; the message names the key.
    """
    if not isinstance(value, dict):
        raise ValueError("unrecorded is not an object")
    steps = whole_number(value.get("steps"), "unrecorded.steps")
    finite = whole_number(value.get("finite"), "unrecorded.finite")
    loss_sum = value.get("loss_sum")
    if finite > steps:
        raise ValueError("unrecorded.finite is more than unrecorded.steps")
    if not is_finite_number(loss_sum):
        raise ValueError("unrecorded.loss_sum is not a finite number")
    return Unrecorded(steps, finite, float(loss_sum))
