"""What is said of two configs that differ."""

from __future__ import annotations

import json

import pytest

from megatron_lpa.config.compare import differences


def test_usual_values_are_told_as_they_are() -> None:
    saved = {
        "model": {"layers": 2, "dropout": 0.0},
        "data": {"prefix": "/a b/ü", "blend": {"x": 1}},
        "gone": None,
    }
    own = {"model": {"layers": 3, "dropout": 0.0}, "data": {"prefix": None, "blend": [1]}, "new": "a"}
    assert differences(saved, own) == [
        "model.layers was 2, is 3",
        "data.prefix was /a b/ü, is None",
        "data.blend was {'x': 1}, is [1]",
        "new was None, is a",
    ]


@pytest.mark.parametrize(
    "text", ["a\nerror: forged line\x1b[31m", "a\r\x07", "\ud800", "\u2028note: x", "\u202egpj", "x" * 10**6]
)
def test_what_a_stranger_wrote_stays_on_one_short_line(text: str) -> None:
    for saved, own in (
        ({"x": text}, {"x": "b"}),
        ({text: 1}, {}),
        ({}, {"x": {text: text}}),
        ({"x": [text]}, {}),
    ):
        (line,) = differences(saved, own, "order.data")
        assert line.isprintable() and len(line) < 400
        assert line.startswith(("order.data.", "'order.data.")) and " was " in line and ", is " in line
        json.dumps(line, ensure_ascii=False).encode()


def test_of_long_values_the_part_is_shown_in_which_they_differ() -> None:
    folder = "/data/" + "x" * 300
    (line,) = differences({"a": f"{folder}/old/" + "y" * 300}, {"a": f"{folder}/new"})
    assert "x/old/y" in line and "x/new" in line and len(line) < 300
