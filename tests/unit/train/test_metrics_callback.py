"""What becomes of the records that callbacks hand in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.errors import UserError
from megatron_lpa.evaluate.metrics_file import read_metrics
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.train.callbacks.console import Console
from megatron_lpa.train.callbacks.metrics import Metrics
from megatron_lpa.train.callbacks.sinks import MetricsFile
from megatron_lpa.train.callbacks.tensorboard import TensorBoard
from megatron_lpa.train.stopping import Stopping, StopRequest


def run_of(folder: Path) -> Any:
    return SimpleNamespace(
        folder=folder, progress=Progress(step=4), lock=None, is_main=True, steps=8,
        stopping=Stopping(ParallelGroups.single(), StopRequest()),
        config=SimpleNamespace(logging=SimpleNamespace(progress_bar="off")),
        engine=SimpleNamespace(groups=None),
    )  # fmt: skip


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Metrics, Any]:
    metrics, run = Metrics([MetricsFile(), Console(), TensorBoard()]), run_of(tmp_path)
    for sink in metrics.sinks:
        sink.look(run)
        sink.open(run)
    return metrics, run


def test_records_of_a_kind_of_ones_own_go_everywhere(
    opened: tuple[Metrics, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, run = opened
    for value in (1.0, math.nan, {1, 2}, {3}):
        metrics.emit(run, {"kind": "probe", "value": value})
    metrics.emit(run, {"kind": "probe", "value": [10**400, "\udcff", True]})
    metrics.close(run)
    assert len(metrics.sinks) == 3 and run.stopping.problem is None
    said = capsys.readouterr()
    assert "step 4/8 probe: value=1\n" in said.out and said.out.count("probe:") == 5
    assert said.err.count("is written as text") == 1 and "value of records of the kind 'probe'" in said.err
    assert [record["value"] for record in read_metrics(run.folder)][:4] == [1.0, None, "{1, 2}", "{3}"]
    assert all(record["step"] == 4 for record in read_metrics(run.folder))


def test_a_record_that_no_tool_would_read_ends_the_run_in_order(opened: tuple[Metrics, Any]) -> None:
    metrics, run = opened
    metrics.emit(run, {"kind": "train", "my_figure": 1.0})
    problem = run.stopping.problem
    assert type(problem) is UserError and problem.exit_code == 78
    assert "a callback's record of the kind 'train' cannot be written: this train record has no tokens" in str(problem)  # fmt: skip  # noqa: E501
    metrics.emit(run, {"kind": "event", "message": "the end"})
    metrics.on_finish(run)
    metrics.close(run)
    assert [record["message"] for record in read_metrics(run.folder)] == ["the end"]
    assert len(metrics.sinks) == 3


def test_a_loss_that_is_not_finite_is_written_in_words(opened: tuple[Metrics, Any]) -> None:
    metrics, run = opened
    figures = {"kind": "valid", "tokens": 8, "loss": math.nan, "perplexity": math.inf, "tokens_evaluated": 9}
    metrics.emit(run, figures)
    metrics.close(run)
    (line,) = (run.folder / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert (found["loss"], found["perplexity"]) == (None, None)
    assert found["not_finite"] == {"loss": "nan", "perplexity": "inf"}


def test_a_warning_is_said_once(opened: tuple[Metrics, Any], capsys: pytest.CaptureFixture[str]) -> None:
    metrics, run = opened
    metrics.on_event(run, "the gradient is not finite")
    metrics.close(run)
    said = capsys.readouterr()
    assert (said.out + said.err).count("the gradient is not finite") == 1
    assert said.err == "warning: the gradient is not finite\n"
    assert read_metrics(run.folder)[0]["message"] == "the gradient is not finite"
