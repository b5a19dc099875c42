"""What a checkpoint asks of a model in training.

A *shard* is a parameter's part on one tensor-parallel rank, flattened. A *fragment* is a range of it whose
state one process holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_lpa.config import RunConfig
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.structures.parameter_spec import ParameterSpec

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
"""What a state holds of each parameter: the fp32 value, and AdamW's moments once there are any."""


@dataclass(frozen=True, eq=False)
class Fragment:
    """A range of one shard that this process holds.

    Args:
        name: the parameter.
        spec: the parameter's spec.
        start: first element, in the flattened shard.
        length: elements.
        copy: number of this copy; other processes hold equal ones.
        copies: how many there are.
    """

    name: str
    spec: ParameterSpec
    start: int
    length: int
    copy: int
    copies: int

    def view(self, kind: str) -> torch.Tensor:
        """(length,) fp32: the state of one of ``KINDS`` itself, not a copy."""
        raise NotImplementedError


class TrainingState(Protocol):
    """A model in training, as a checkpoint saves and restores it. Each process has one.

    Attributes:
        groups: where this process stands.
        config: of the run.
        zero_stage: ZeRO's stage, as the run asks for it.
        specs: of all parameters, by name, in the model's order.
        weight_bytes: of one element of the weights that compute.
        versions: what trains, and its version; goes into the manifest.
    """

    groups: ParallelGroups
    config: RunConfig
    zero_stage: int
    specs: dict[str, ParameterSpec]
    weight_bytes: int
    versions: dict[str, str]

    def skipped_steps(self) -> int:
        """Steps that changed nothing because the gradient's norm was not finite."""
        ...

    def settle(self) -> None:
        """Wait until the device has done what training asked of it."""
        ...

    def fragments(self) -> Sequence[Fragment]:
        """What this process holds, in the model's order of parameters."""
        ...

    def optimizer_step(self) -> int:
        """AdamW's count of steps here; 0 before the first, when it has no moments, and where no fragment is
        held."""
        ...

    def gathered_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every parameter's name and unsharded value: on rank 0's device, with memory of its own; None on
        other ranks.

        Every rank has to go through all of them: each is gathered by collectives.
        """
        ...

    def before_restoring(self) -> None:
        """Let go of what would be in the way. No collective."""
        ...

    def set_optimizer_step(self, step: int) -> None:
        """Give AdamW this count of steps and moments to write to; with 0 it has none. No collective."""
        ...

    def after_restoring(self, step: int, samples: int, skipped_steps: int) -> None:
        """Make the weights that compute follow from the masters; every rank calls it.

        Args:
            step: optimizer steps done.
            samples: consumed.
            skipped_steps: of these, those that changed nothing.
        """
        ...
