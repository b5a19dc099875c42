"""A report's numbers against records made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa.commands import report
from megatron_lpa.evaluate.run_report import comparison_table, summarize
from megatron_lpa.model.transformer import Decoder

SaveRun = Callable[..., Path]


def write_metrics(folder: Path, speeds: list[float], test_loss: float | None) -> None:
    records: list[dict[str, Any]] = [
        {
            "kind": "train",
            "step": 5 * number,
            "tokens": 640 * number,
            "loss": 9.0 - number,
            "step_ms": 128000 / speed,
            "tokens_per_second": speed,
            "memory_peak_bytes": number * 2**20,
        }
        for number, speed in enumerate(speeds, start=1)
    ]
    records.append({"kind": "valid", "step": 5, "tokens": 640, "loss": 7.0})
    records.append({"kind": "valid", "step": 20, "tokens": 2560, "loss": 2.0})
    if test_loss is not None:
        records.append({"kind": "test", "step": 20, "tokens": 2560, "loss": test_loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def cells(text: str) -> dict[str, list[str]]:
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_numbers_by_hand(tmp_path: Path, save_run: SaveRun, decoder: Decoder) -> None:
    first, second = save_run(tmp_path / "runs" / "one"), save_run(tmp_path / "runs" / "two")
    write_metrics(first, [1.0, 1000, 3000, 2000], test_loss=math.log(8))
    write_metrics(second, [1.0, 4000, 4000, 4000], test_loss=math.log(2))
    table = cells(comparison_table([summarize(first), summarize(second, "other")]))
    assert table[""] == ["one", "other", "other / one"]
    assert table["processes"] == ["6 (TP 2 x DP 3, ZeRO-3, fp32)"] * 2 + [""]
    total = sum(parameter.numel() for parameter in decoder.parameters())
    attention = sum(p.numel() for name, p in decoder.named_parameters() if ".attention." in name)
    assert table["parameters"] == [f"{total:,}", f"{total:,}", "1.000"]
    assert table["of them in attention"][0] == f"{attention:,}"
    assert table["tokens trained on"] == ["2,560", "2,560", ""]
    # The median leaves out the first interval.
    assert table["tokens per second"] == ["2,000", "4,000", "2.000"]
    assert table["step time"] == ["64 ms", "32 ms", "0.500"]
    assert table["peak memory per process"][0] == "4 MiB"
    assert table["validation perplexity"][0] == "7.39"
    assert table["test loss"] == ["2.0794", "0.6931", "0.333"]
    assert table["test perplexity"] == ["8.00", "2.00", "0.250"]


def test_what_was_not_measured_is_said(tmp_path: Path, save_run: SaveRun) -> None:
    run = save_run(tmp_path / "runs" / "one", steps=())
    write_metrics(run, [1000], test_loss=None)
    table = cells(comparison_table([summarize(run)]))
    for row in ("processes", "tokens per second", "step time", "test loss", "test perplexity"):
        assert table[row] == ["not measured"], row
    assert table["last training loss"] == ["8.0000"]


def test_a_test_of_earlier_weights_is_not_that_of_the_run(tmp_path: Path, save_run: SaveRun) -> None:
    """A run that was complete at step 20, and went on to step 25 without being tested there yet."""
    run = save_run(tmp_path / "runs" / "one")
    write_metrics(run, [1000] * 5, test_loss=3.0)
    summary = summarize(run)
    assert (summary.steps, summary.test_loss, summary.valid_loss) == (25, None, 2.0)


@pytest.mark.parametrize("loss", ["null", "NaN", "Infinity"])
def test_losses_that_are_not_finite_are_said_to_be(
    tmp_path: Path, save_run: SaveRun, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    runs = [save_run(tmp_path / "runs" / name) for name in ("one", "two")]
    for run in runs:
        write_metrics(run, [1000, 1000], test_loss=3.0)
    metrics = runs[0] / "metrics.jsonl"
    lines = [
        line[: line.rindex('"loss": ')] + f'"loss": {loss}}}' for line in metrics.read_text().splitlines()[2:]
    ]
    metrics.write_text("\n".join([*metrics.read_text().splitlines()[:2], *lines]) + "\n")
    table = cells(comparison_table([summarize(run) for run in runs]))
    for row in ("validation loss", "validation perplexity", "test loss", "test perplexity"):
        assert table[row][0] == "not finite" and table[row][2] == "", row
    assert table["last training loss"][0] == "7.0000"
    assert report.main([*(f"--run={run}" for run in runs), "--output", str(tmp_path / "report")]) == 0


def test_the_tool_writes_report_and_plot(
    tmp_path: Path, save_run: SaveRun, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [save_run(tmp_path / "runs" / name) for name in ("one", "two")]
    for run in runs:
        write_metrics(run, [1000, 1000], test_loss=3.0)
    argv = ["--run", str(runs[0]), "--run", str(runs[1]), "--prompt", "The name"]
    assert report.main([*argv, "--output", str(tmp_path / "report"), "--max-new-tokens", "5"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "![Loss by tokens and by training time](loss.png)" in text
    assert text.count("    The name") == 2
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["loss.png", "report.md"]
    assert report.main(["--run", str(tmp_path)]) == 78
    assert "config.yaml: no such file" in capsys.readouterr().err
