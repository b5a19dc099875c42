"""What is said of two configs that differ."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from megatron_lpa.config import ModelConfig
from megatron_lpa.config.compare import completed, differences


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


def test_a_saved_model_of_an_earlier_version_is_today_s_with_its_defaults() -> None:
    """Settings that came later do by default what was done before; what somebody set otherwise is a
    difference."""
    own = dataclasses.asdict(ModelConfig(num_layers=3))
    earlier = copy.deepcopy(own)
    for projection in earlier["projections"].values():
        del projection["bias"], projection["by_layer"]
    defaults = dataclasses.asdict(ModelConfig())
    assert differences(completed(earlier, defaults), own, "model") == []
    own["projections"]["q"] |= {"bias": "output", "by_layer": {"0": "dense"}}
    assert differences(completed(earlier, defaults), own, "model") == [
        "model.projections.q.bias was default, is output", "model.projections.q.by_layer was None, is {'0': 'dense'}",  # noqa: E501
    ]  # fmt: skip
    del earlier["num_layers"]
    assert "num_layers was 12, is 3" in differences(completed(earlier, defaults), own)
