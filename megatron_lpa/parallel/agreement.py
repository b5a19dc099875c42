"""Small decisions that all ranks must take alike, over gloo on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import LASTING
from megatron_lpa.parallel.groups import ParallelGroups

Result = TypeVar("Result")

FINE, OUTSIDE, REFUSED = 0, 1, 2
"""How bad a rank's problem is; the worst decides for all."""


def severity_of(error: Exception) -> int:
    """``REFUSED`` for bad input, which stays bad, and for names and permissions; ``OUTSIDE`` for what may be
    gone at the next attempt, or nobody foresaw.
    """
    if isinstance(error, OSError):
        return REFUSED if error.errno in LASTING else OUTSIDE
    return REFUSED if isinstance(error, UserError) and not isinstance(error, TryAgain) else OUTSIDE


def in_words(error: Exception) -> str:
    """An error for the user: the file before what the system says of it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error)


def worst_error(severity: int) -> type[UserError]:
    """What all ranks raise when the worst problem of any is this bad."""
    return UserError if severity == REFUSED else TryAgain


@contextlib.contextmanager
def _waiting(groups: ParallelGroups) -> Iterator[None]:
    groups.on_wait(True)
    try:
        yield
    finally:
        groups.on_wait(False)


def largest_of_all(value: int, groups: ParallelGroups) -> int:
    """The largest of all ranks' values."""
    if groups.control_group is None or groups.world_size == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64)
    with _waiting(groups):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=groups.control_group)
    return int(tensor)


def gather_numbers(value: float, groups: ParallelGroups) -> list[float]:
    """Every rank's value, in order of rank."""
    if groups.control_group is None or groups.world_size == 1:
        return [value]
    tensors = [torch.zeros(1, dtype=torch.float64) for _ in range(groups.world_size)]
    with _waiting(groups):
        dist.all_gather(tensors, torch.tensor([value], dtype=torch.float64), group=groups.control_group)
    return [float(tensor) for tensor in tensors]


def gather_json(value: Any, groups: ParallelGroups) -> list[Any]:
    """Every rank's value, in order of rank. It travels as JSON: nothing that another process sends can run
    code here.

    Args:
        value: None, bool, int, float, str, and lists and dicts with text keys of these. Tuples come back as
            lists.
        groups: all ranks take part.
    """
    if groups.control_group is None or groups.world_size == 1:
        return [json.loads(json.dumps(value))]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(groups.world_size)]
    with _waiting(groups):
        dist.all_gather(lengths, torch.tensor([len(own)]), group=groups.control_group)
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(groups.world_size)]
        padded = torch.nn.functional.pad(own, (0, longest - len(own)))
        dist.all_gather(texts, padded, group=groups.control_group)
    return [
        json.loads(text[: int(length)].numpy().tobytes()) for text, length in zip(texts, lengths, strict=True)
    ]


def from_first(value: Any, groups: ParallelGroups) -> Any:
    """Rank 0's value on every rank; what other ranks pass does not count. It travels as JSON, like
    ``gather_json``'s."""
    if groups.control_group is None or groups.world_size == 1:
        return json.loads(json.dumps(value))
    text = json.dumps(value).encode() if groups.rank == 0 else b""
    length = torch.tensor([len(text)])
    with _waiting(groups):
        dist.broadcast(length, src=0, group=groups.control_group)
        sent = torch.zeros(int(length), dtype=torch.uint8)
        if text:
            sent = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(sent, src=0, group=groups.control_group)
    return json.loads(sent.numpy().tobytes())


def gather_messages(message: str | None, groups: ParallelGroups) -> str:
    """Every rank's message with its rank in front, joined; empty when no rank has one.

    Equal messages of several ranks are given once.
    """
    if groups.control_group is None or groups.world_size == 1:
        return message or ""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(gather_json(message, groups)):
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
        UserError: on every rank, when ``work`` raised an exception on any. It is a :class:`TryAgain` when
            none of them was a plain ``UserError``: a disk may answer again, where bad input stays bad.
    """
    result: Result | None = None
    problem, severity = None, FINE
    try:
        result = work()
    except (UserError, OSError) as error:
        problem, severity = in_words(error), severity_of(error)
    except Exception as error:
        traceback.print_exc()
        problem, severity = f"{type(error).__name__}: {error}", severity_of(error)
    if worst := largest_of_all(severity, groups):
        raise worst_error(worst)(gather_messages(problem, groups))
    return cast(Result, result)
