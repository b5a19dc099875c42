"""Whatever a callback hands in, what is written is JSON and a record that the tools read, or a clear
refusal."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lpa.evaluate.metrics_file import read_metrics, records_of
from megatron_lpa.record_values import CannotRecord, encoded, finished
from megatron_lpa.records import Kept, keep_records, perplexity
from megatron_lpa.run_folder import METRICS


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def read_back(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(encoded(record), parse_constant=refuse_constant)
    return found


def test_what_is_not_finite_is_null_and_named() -> None:
    given = {"kind": "valid", "step": 4, "tokens": 9, "loss": math.nan, "perplexity": math.inf, "norms": [1.0, -math.inf]}  # fmt: skip  # noqa: E501
    record, as_text = finished(given, 4, 5.0)
    assert read_back(record) == {
        "kind": "valid", "step": 4, "tokens": 9, "loss": None, "perplexity": None, "norms": [1.0, None],
        "time": 5.0,
        "not_finite": {"loss": "nan", "perplexity": "inf", "norms.1": "-inf"},
    }  # fmt: skip
    assert as_text == []
    assert "not_finite" not in finished({"kind": "event", "message": "x"}, 4, 5.0)[0]


def test_a_record_that_was_not_finished_is_json_too() -> None:
    assert read_back({"loss": math.nan, "x": {"y": math.inf}}) == {"loss": None, "x": {"y": None}}


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (torch.tensor(0.25, requires_grad=True), 0.25),
        (torch.tensor([3]), 3),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([1.5, np.nan]), [1.5, None]),
        ((1, "a", None, True), [1, "a", None, True]),
        ({1: Path("x/y")}, {"1": "x/y"}),
        (10**30, 10**30),
    ],
)
def test_values_of_other_libraries_become_what_json_has(value: Any, written: Any) -> None:
    record, as_text = finished({"kind": "probe", "value": value}, 3, 0.0)
    assert read_back(record)["value"] == written and as_text == []


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def test_a_value_that_gives_nothing_ends_no_run_with_a_traceback() -> None:
    record, as_text = finished({"kind": "probe", "a": torch.empty(2, device="meta")}, 3, 0.0)
    assert "meta" in read_back(record)["a"] and as_text == ["a"]
    with pytest.raises(CannotRecord, match="its a is a Unspeakable that cannot be shown"):
        finished({"kind": "probe", "a": Unspeakable()}, 3, 0.0)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", 1j, object(), Decimal(2), lambda: None])
def test_what_json_has_nothing_for_becomes_text_and_is_named(value: Any) -> None:
    record, as_text = finished({"kind": "probe", "a": [value]}, 3, 0.0)
    assert read_back(record)["a"] == [repr(value)[:200]] and as_text == ["a.0"]


@pytest.mark.parametrize("step", [7, np.int32(7), 7.0, torch.tensor(7)])
def test_a_step_is_a_whole_number_and_the_runs_where_there_is_none(step: Any) -> None:
    record = finished({"kind": "probe", "step": step}, 3, 0.0)[0]
    assert record["step"] == 7 and type(record["step"]) is int
    assert finished({"kind": "probe"}, 3, 0.0)[0]["step"] == 3


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"step": 3}, "its kind has to be a text"),
        ({"kind": ""}, "its kind has to be a text"),
        ({"kind": 5}, "its kind has to be a text"),
        ({"kind": "a\nb"}, "its kind has to be a text"),
        ({"kind": "probe", "time": 1.0}, "the key 'time' is added"),
        ({"kind": "probe", "not_finite": {}}, "the key 'not_finite' is added"),
        ({"kind": "probe", "step": -1}, "its step is -1"),
        ({"kind": "probe", "step": 1.5}, "its step is 1.5"),
        ({"kind": "probe", "step": math.nan}, "its step is nan"),
        ({"kind": "probe", "step": "3"}, "its step is '3'"),
        ({"kind": "probe", "step": True}, "its step is True"),
        ({"kind": "train", "my_figure": 1}, "this train record has no tokens"),
        ({"kind": "valid", "tokens": 1, "loss": "low"}, "the loss of this valid record is 'low'"),
        ({"kind": "test", "tokens": math.inf, "loss": 1.0}, "the tokens of this test record is None"),
        ({"kind": "probe", "text": "x" * (17 << 20)}, "more than the 16,777,216"),
        ({"kind": "probe", "deep": CYCLE}, "nested too deeply"),
        ({"kind": "probe", "large": 10**5000}, "mend the record"),
        (["probe"], "no mapping"),
    ],
)
def test_what_no_tool_would_read_is_refused(given: Any, words: str) -> None:
    with pytest.raises(CannotRecord, match=words):
        finished(given, 3, 0.0)


OTHERS = (
    b'{"kind": "note", "text": "of a person"}',
    b'{"kind": "grads", "step": 1, "norms": {"q": 1.0}}',
    b'{"kind": "valid", "step": 1, "tokens": 8, "loss": NaN, "perplexity": Infinity}',
    b'{"kind": "test", "step": 1, "tokens": 8, "loss": -Infinity}',
)


def test_tools_pass_over_kinds_of_others_and_read_what_earlier_versions_wrote(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_bytes(b"".join(line + b"\n" for line in OTHERS))
    found = read_metrics(tmp_path)
    assert [record["kind"] for record in found] == ["grads", "valid", "test"]
    assert math.isnan(records_of(found, "valid")[0]["loss"])
    kept = keep_records(path, lambda record: record["kind"] != "test", "aside.jsonl")
    assert isinstance(kept, Kept) and kept.damage is None
    assert path.read_bytes().splitlines() == list(OTHERS[:3])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(0.0, 1.0), (math.log(8), 8.0), (709.0, math.exp(709.0)), (710.0, math.inf), (math.inf, math.inf)],
)
def test_perplexity(loss: float, expected: float) -> None:
    assert perplexity(loss) == pytest.approx(expected)
    assert math.isnan(perplexity(math.nan))
