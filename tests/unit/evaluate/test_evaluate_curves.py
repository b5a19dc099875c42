"""What a plot shows, read back from the figure."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lpa import files
from megatron_lpa import records as reading
from megatron_lpa.commands import plot_curves
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.evaluate.curves import figure_of, read_curve, save_png, smoothed
from megatron_lpa.evaluate.metrics_file import read_metrics


def write_metrics(folder: Path, records: Sequence[dict[str, Any]], end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_bytes((text + end).encode(errors="surrogateescape"))
    return folder


def train(step: int, loss: float, step_ms: float = 100.0) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": 1000 * step, "loss": loss, "step_ms": step_ms}


def valid(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "valid", "step": step, "tokens": 1000 * step, "loss": loss}


def test_time_is_that_of_the_steps_alone(tmp_path: Path) -> None:
    records = [
        {**train(10, 5.0, 200), "time": 1000.0},
        valid(10, 5.1),
        {"kind": "event", "step": 10, "message": "checkpoint"},
        {**train(20, 4.0, 100), "time": 90000.0},  # resumed a day later
        valid(20, 4.2),
        train(25, 3.5, 400),
    ]
    curve = read_curve(write_metrics(tmp_path / "a", records), "a")
    np.testing.assert_allclose(curve.seconds, [2.0, 3.0, 5.0])
    np.testing.assert_allclose(curve.valid_seconds, [2.0, 3.0])
    np.testing.assert_allclose(curve.tokens, [10000, 20000, 25000])
    np.testing.assert_allclose(curve.valid_loss, [5.1, 4.2])


def test_smoothing_is_a_centred_mean() -> None:
    values = np.array([1.0, 5.0, 3.0, 4.0])
    np.testing.assert_allclose(smoothed(values, 3), [3.0, 3.0, 4.0, 3.5])
    np.testing.assert_allclose(smoothed(values, 1), values)


def test_panels_lines_and_legend(tmp_path: Path) -> None:
    curves = [
        read_curve(write_metrics(tmp_path / name, [train(10, 5.0), train(20, 4.0), valid(20, 4.5)]), name)
        for name in ("first", "second")
    ]
    by_tokens, by_time = figure_of(curves).axes
    assert by_tokens.get_xlabel() == "Tokens trained on (thousands)"
    assert by_time.get_xlabel() == "Training time (seconds)"
    assert by_tokens.get_ylabel() == "Loss (nats per token)"
    assert [text.get_text() for text in by_time.get_legend().get_texts()] == ["first", "second", "validation"]
    lines = {line.get_label(): line for line in by_tokens.lines}
    np.testing.assert_allclose(lines["second"].get_xydata(), [[10, 5], [20, 4]])
    assert lines["first"].get_color() != lines["second"].get_color()
    assert len(figure_of(curves, "time").axes) == 1


def test_the_tool_writes_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_metrics(tmp_path / "a", [train(10, 5.0), train(20, 4.0)]))
    output = tmp_path / "new" / "x.png"
    assert plot_curves.main(["--run", run, "--run", run, "--labels", "a", "b", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG\r\n")
    assert plot_curves.main(["--run", run, "--labels", "a", "b", "--output", str(output)]) == 78
    assert "2 names for 1 runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "train", "step"', r"metrics\.jsonl:2: not valid JSON"),
        ("[1]", r"metrics\.jsonl:2: not a JSON object"),
        ('{"kind": ["train"], "step": 20}', r"metrics\.jsonl:2: its kind is \['train'\], not text"),
        (
            '{"kind": "train", "step": 2, "tokens": 9, "step_ms": 1}',
            r"metrics\.jsonl:2: .* record has no loss",
        ),
        ('{"kind": "event", "step": NaN}', r"metrics\.jsonl:2: its step is nan"),
        ('{"kind": "event", "step": 1, "message": "\udcff"}', r"metrics\.jsonl:2: not UTF-8 text \(byte 41"),
        ("[" * 100_000, r"metrics\.jsonl:2: not valid JSON \(nested too deeply\)"),
        (
            json.dumps({"kind": "valid", "step": 2, "tokens": 10**400, "loss": 1}),
            r"metrics\.jsonl:2: the tokens of",
        ),
        ('{"kind": "train", "step": 20}', r"metrics\.jsonl:2: this train record has no tokens"),
        ('{"kind": "valid", "step": 2, "tokens": 9, "loss": "x"}', r"metrics\.jsonl:2: the loss .* 'x'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    folder = write_metrics(tmp_path, [train(10, 5.0)], line + "\n" + json.dumps(train(30, 4.0)) + "\n")
    with pytest.raises(UserError, match=message):
        read_metrics(folder)


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path, [train(10, 5.0)], '{"kind": "train", "st')
    assert [record["step"] for record in read_metrics(folder)] == [10]
    with pytest.raises(UserError, match=r"none/metrics\.jsonl: cannot be read"):
        read_metrics(tmp_path / "none")


def test_a_plot_in_a_run_folder_from_a_stranger_goes_where_no_link_leads(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("of somebody else")
    folder = write_metrics(tmp_path / "run", [train(10, 5.0), train(20, 4.0)])
    for name in ("loss.png", "loss.png.partial", ".loss.png.partial", "loss.png.partial.lock"):
        (folder / name).symlink_to(outside)
    save_png(figure_of([read_curve(folder, "a")]), folder / "loss.png")
    assert outside.read_text() == "of somebody else"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG") and not (
        folder / "loss.png"
    ).is_symlink()


def test_what_is_not_finite_is_a_gap_and_the_rest_is_drawn(tmp_path: Path) -> None:
    """Training writes null there; earlier versions wrote NaN and Infinity for validations."""
    losses = [5.0, None, 3.0, None, 4.0, 2.0, float("inf")]
    records = [train(10 * number, 1.0) | {"loss": loss} for number, loss in enumerate(losses, start=1)]
    records += [
        valid(10, float("nan")),
        valid(20, float("inf")),
        valid(30, 2.5),
        valid(40, 1.0) | {"loss": None},
    ]
    curve = read_curve(write_metrics(tmp_path, records), "a")
    assert np.isnan(curve.loss).tolist() == [loss in (None, float("inf")) for loss in losses]
    assert np.isnan(curve.valid_loss).tolist() == [True, True, False, True]
    (panel,) = figure_of([curve], "tokens").axes
    line, dots, validations = panel.lines[:3]
    np.testing.assert_array_equal(line.get_ydata(), [5, np.nan, 3, np.nan, 4, 2, np.nan])
    # A line does not show what has no neighbour.
    np.testing.assert_allclose(dots.get_xydata(), [[10, 5], [30, 3]])
    assert dots.get_marker() == "." and validations.get_ydata()[2] == 2.5
    low, high = panel.get_ylim()
    assert low < 2.0 and high > 4.0


def test_gaps_have_no_part_in_a_mean(tmp_path: Path) -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(smoothed(values, 3), [1.0, np.nan, 4.0, 4.0])
    np.testing.assert_allclose(smoothed(np.array([np.nan, np.nan]), 3), [np.nan, np.nan])


def test_a_run_without_any_finite_loss_is_drawn_empty(tmp_path: Path) -> None:
    records = [train(step, 1.0) | {"loss": None} for step in (10, 20)]
    curve = read_curve(write_metrics(tmp_path, records), "a")
    save_png(figure_of([curve], smooth=2), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_only_record_is_drawn(tmp_path: Path) -> None:
    (panel,) = figure_of([read_curve(write_metrics(tmp_path, [train(10, 5.0)]), "a")], "tokens").axes
    assert [len(line.get_xydata()) for line in panel.lines if line.get_marker() == "."] == [1]


def test_a_disk_that_does_not_give_the_records_is_no_bad_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_metrics(tmp_path, [train(10, 5.0)])
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))

    def failing(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(reading, "open_regular", failing)
    with pytest.raises(TryAgain, match=r"metrics\.jsonl: cannot be read \(Stale file handle\)"):
        read_metrics(folder)
