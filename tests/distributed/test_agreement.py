"""What ranks tell each other travels as JSON: nothing that another process sends can run code."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from support.world import groups_for

from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.parallel.agreement import from_first, gather_json, gather_messages, together
from megatron_lpa.parallel.groups import ParallelGroups

VALUES = [None, {"a": [1, 2.5, "ü\0\n"], "b": {"c": None}}, "x" * 100_000, []]


def gathered(values: list[Any]) -> tuple[list[Any], Any, str]:
    groups = groups_for(1)
    own = values[groups.rank]
    return gather_json(own, groups), from_first(own, groups), gather_messages(str(groups.rank % 2), groups)


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_gets_every_value(world: Any, size: int) -> None:
    for shift in range(size):
        values = (VALUES[shift:] + VALUES[:shift])[:size]
        for everything, first, messages in world(size).run(gathered, values):
            assert everything == values and first == values[0]
            assert messages == {2: "rank 0: 0; rank 1: 1", 4: "rank 0,2: 0; rank 1,3: 1"}[size]


def test_one_process_gets_what_several_would() -> None:
    groups = ParallelGroups.single()
    assert gather_json({"a": (1, 2)}, groups) == [{"a": [1, 2]}]
    assert from_first({"a": (1, 2)}, groups) == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        (errno.EACCES, 78),
        (errno.EROFS, 78),
        (errno.ENOENT, 78),
        (errno.ESTALE, 1),
        (errno.ENOSPC, 1),
        (errno.EMFILE, 1),
    ],
)
def test_names_and_permissions_stay_and_what_a_disk_says_may_pass(number: int, exit_code: int) -> None:
    def work() -> None:
        raise OSError(number, "so it is", "folder/file")

    with pytest.raises(UserError, match=r"^folder/file: so it is$") as caught:
        together(work, ParallelGroups.single())
    assert caught.value.exit_code == exit_code and isinstance(caught.value, TryAgain) == (exit_code == 1)
