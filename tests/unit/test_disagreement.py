"""What differs between ranks is told shortly, and by the names that a user knows."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lpa.parallel.disagreement import disagreement, flat


def test_the_odd_one_out_is_the_one_in_the_minority() -> None:
    facts = [{"a": 1, "b": 2}, {"a": 0, "b": 2}, {"a": 0, "b": 2}]
    assert "a is 1 on rank 0 (x), but 0 on rank 1 (y)" in disagreement(facts, ["x", "y", "z"])
    halves = disagreement([{"a": 1}, {"a": 0}], ["x", "y"])
    assert "a is 0 on rank 1 (y), but 1 on rank 0 (x)" in halves
    assert disagreement([{"a": [1, None]}] * 3, ["x"] * 3) == ""


def test_a_message_stays_short_whatever_differs() -> None:
    facts = [
        {f"key{n}": "x" * 10_000 for n in range(100)},
        {f"key{n}": "y" * 10_000 for n in range(100)},
    ] * 50
    message = disagreement(facts, [f"node{rank}" for rank in range(100)])
    assert (
        len(message) < 8_000 and "and 92 more" in message and "rank 1, 3, 5, " in message and "..." in message
    )


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("x" * 1000 + "a" * 500, "x" * 1000 + "b" * 500, ("x" * 39 + "b" * 60, "x" * 39 + "a" * 60)),
        ("x" * 1000, "x" * 1000 + "y", ('xxxy" on rank 2', 'xxx" on rank 0')),
        ("x" * 1000, 7, ("7 on rank 2", '"xxx')),
        (
            {"a": "x" * 1000, "b": {"c": 1, "d": "y" * 1000}},
            {"a": "x" * 1000, "b": {"c": 2, "d": "y" * 1000}},
            ("value.b.c is 2 on rank 2 (z), but 1 on rank 0 (x)",),
        ),
        (
            {"a": "x" * 1000},
            {"a": "x" * 1000, "b": 1},
            ("value.b is 1 on rank 2 (z), but not there on rank 0",),
        ),
        (["x" * 1000, 1], ["x" * 1000, 2], ("value[1] is 2 on rank 2 (z), but 1 on rank 0",)),
        (["x" * 1000], ["x" * 1000, 2], ("value[1] is 2 on rank 2 (z), but not there on rank 0",)),
        ({"x\n" * 100: "a"}, {"x\n" * 100: "b"}, ('is "b" on rank 2 (z), but "a" on rank 0',)),
    ],
)
def test_long_values_are_shown_where_they_differ(first: Any, second: Any, words: tuple[str, ...]) -> None:
    message = disagreement([{"value": first}, {"value": first}, {"value": second}], ["x", "y", "z"])
    assert all(text in message for text in words), message
    assert message.isprintable() and len(message) < 700


def test_every_long_value_is_shown_where_it_differs_from_the_usual_one() -> None:
    facts = [{"value": "x" * 1000 + end} for end in ("", "", "a", "b")]
    message = disagreement(facts, ["h"] * 4)
    assert 'xa" on rank 2 (h), but ' in message and 'xb" on rank 3 (h), but ' in message
    facts = [{"value": f"{'x' * 1000}{rank}"} for rank in range(100)]
    assert "; and 91 more values of value" in disagreement(facts, ["h"] * 100)


def test_names_of_values_are_those_that_a_user_knows() -> None:
    tree = {"train": {"seed": 1, "empty": {}}, "list": [{"a": 1}]}
    assert dict(flat(tree)) == {"train.seed": 1, "train.empty": {}, "list": [{"a": 1}]}
