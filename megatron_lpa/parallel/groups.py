"""Process groups: the only place that creates them.

Ranks of one tensor-parallel group are neighbours (``rank = dp_rank * tp_size + tp_rank``), so that on
a node with as many devices as ``tp_size`` the group stays inside the node.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_lpa.errors import UserError


@dataclass
class Traffic:
    """Counts what a rank sends through tensor-parallel collectives.

    ``elements`` is what ring algorithms move per rank: ``2 n (t-1)/t`` for an all-reduce of n
    elements over t ranks, ``n (t-1)/t`` for an all-gather to, or a reduce-scatter from, n elements.
    """

    calls: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def record(self, collective: str, full_tensor: torch.Tensor, group_size: int) -> None:
        """Count one collective whose largest (ungathered or gathered) tensor is ``full_tensor``."""
        passes = 2 if collective == "all_reduce" else 1
        moved = passes * full_tensor.numel() * (group_size - 1) // group_size
        self.calls[collective] += 1
        self.elements[collective] += moved
        self.bytes[collective] += moved * full_tensor.element_size()

    def reset(self) -> None:
        """Start counting anew."""
        for counter in (self.calls, self.elements, self.bytes):
            counter.clear()


def _nobody_asks(waits: bool) -> None:
    """Where nobody watches."""


@dataclass(frozen=True)
class ParallelGroups:
    """Where this process stands, and the groups it communicates in.

    Args:
        rank: rank in the world.
        world_size: processes in all.
        tp_rank: rank in the tensor-parallel group.
        tp_size: size of the tensor-parallel group.
        dp_rank: rank in the data-parallel group.
        dp_size: size of the data-parallel group.
        tp_group: ranks that share one copy of the model; None without ``torch.distributed``.
        dp_group: ranks that hold the same tensor-parallel shard; None without ``torch.distributed``.
        control_group: all ranks over gloo, for small decisions on the CPU that must not touch a GPU
            stream; None without ``torch.distributed``.
        traffic: what this rank moved in tensor-parallel collectives.
        on_wait: told True before this rank waits for all others in ``control_group``, and False after it.
    """

    rank: int = 0
    world_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    on_wait: Callable[[bool], None] = field(default=_nobody_asks, compare=False)

    @classmethod
    def single(cls) -> ParallelGroups:
        """One process, no communication."""
        return cls()

    @classmethod
    def create(
        cls,
        tensor_parallel_size: int,
        timeout: datetime.timedelta = datetime.timedelta(minutes=30),
        on_wait: Callable[[bool], None] = _nobody_asks,
    ) -> ParallelGroups:
        """Build all groups. Every rank of an initialised world must call it.

        Raises:
            UserError: the world cannot be divided into groups of ``tensor_parallel_size``.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        tp_size = tensor_parallel_size
        if world_size % tp_size:
            raise UserError(
                f"parallel.tensor_parallel_size={tp_size} does not divide the world size {world_size}; "
                f"start a multiple of {tp_size} processes or choose a divisor of {world_size}"
            )
        dp_size = world_size // tp_size
        tp_group = dp_group = None
        # new_group is collective over the world: every rank creates every group, in the same order.
        for dp_rank in range(dp_size):
            ranks = list(range(dp_rank * tp_size, (dp_rank + 1) * tp_size))
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                tp_group = group
        for tp_rank in range(tp_size):
            ranks = list(range(tp_rank, world_size, tp_size))
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                dp_group = group
        control_group = dist.new_group(list(range(world_size)), timeout=timeout, backend="gloo")
        return cls(
            rank=rank,
            world_size=world_size,
            tp_rank=rank % tp_size,
            tp_size=tp_size,
            dp_rank=rank // tp_size,
            dp_size=dp_size,
            tp_group=tp_group,
            dp_group=dp_group,
            control_group=control_group,
            on_wait=on_wait,
        )
