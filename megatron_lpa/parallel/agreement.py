"""Small decisions that all ranks must take alike, over gloo on the CPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.parallel.groups import ParallelGroups

Result = TypeVar("Result")

FINE, OUTSIDE, REFUSED = 0, 1, 2
"""How bad a rank's problem is; the worst decides for all."""


def severity_of(error: Exception) -> int:
    """``REFUSED`` for bad input, which stays bad; ``OUTSIDE`` for what may be gone at the next attempt, or nobody foresaw."""
    return REFUSED if isinstance(error, UserError) and not isinstance(error, TryAgain) else OUTSIDE


def worst_error(severity: int) -> type[UserError]:
    """What all ranks raise when the worst problem of any is this bad."""
    return UserError if severity == REFUSED else TryAgain


def largest_of_all(value: int, groups: ParallelGroups) -> int:
    """The largest of all ranks' values."""
    if groups.control_group is None or groups.world_size == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=groups.control_group)
    return int(tensor)


def gather_numbers(value: float, groups: ParallelGroups) -> list[float]:
    """Every rank's value, in order of rank."""
    if groups.control_group is None or groups.world_size == 1:
        return [value]
    tensors = [torch.zeros(1, dtype=torch.float64) for _ in range(groups.world_size)]
    dist.all_gather(tensors, torch.tensor([value], dtype=torch.float64), group=groups.control_group)
    return [float(tensor) for tensor in tensors]


def gather_messages(message: str | None, groups: ParallelGroups) -> str:
    """Every rank's message with its rank in front, joined; empty when no rank has one.

    Equal messages of several ranks are given once.
    """
    if groups.control_group is None or groups.world_size == 1:
        return message or ""
    messages: list[str | None] = [None] * groups.world_size
    dist.all_gather_object(messages, message, group=groups.control_group)
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(messages):
        if text:
            ranks_of.setdefault(text, []).append(rank)
    if len(ranks_of) == 1 and len(next(iter(ranks_of.values()))) == groups.world_size:
        return next(iter(ranks_of))
    return "; ".join(f"rank {','.join(map(str, ranks))}: {text}" for text, ranks in ranks_of.items())


def together(work: Callable[[], Result], groups: ParallelGroups) -> Result:
    """Do the same work on every rank; if it fails on any, fail on all with all messages.

    One small all-reduce when all goes well. An unexpected exception also prints its traceback where it
    was raised.

    Raises:
        UserError: on every rank, when ``work`` raised an exception on any. It is a :class:`TryAgain` when none of them
            was a plain ``UserError``: a disk may answer again, where bad input stays bad.
    """
    result: Result | None = None
    problem, severity = None, FINE
    try:
        result = work()
    except (UserError, OSError) as error:
        problem, severity = str(error), severity_of(error)
    except Exception as error:
        traceback.print_exc()
        problem, severity = f"{type(error).__name__}: {error}", severity_of(error)
    if worst := largest_of_all(severity, groups):
        raise worst_error(worst)(gather_messages(problem, groups))
    return cast(Result, result)
