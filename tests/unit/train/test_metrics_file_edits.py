"""The metrics file where somebody cuts its head, copies it with hard links, or the disk fails after it was
written anew."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_metrics_file import FakeRun, events, lines, opened, record, written

from megatron_lpa import records
from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.run_folder import METRICS
from megatron_lpa.train.callbacks.sinks import MetricsFile


@pytest.fixture
def failing_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(records, "fsync_folder", fails)


@pytest.mark.usefixtures("failing_folder")
def test_going_back_on_a_disk_that_fails_afterwards_is_no_replacement_by_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = written(tmp_path, 1, 2, 3)
    sink.rewind(FakeRun(tmp_path, Progress(step=1)))  # type: ignore[arg-type]
    for step in (2, 3):
        sink.write(record(step))
    sink.close()
    assert lines(tmp_path) == [1, 2, 3] and events(tmp_path) == []
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "is complete, but its folder could not be brought to disk: [Errno 5]" in told[0]


@pytest.mark.usefixtures("failing_folder")
def test_damage_is_told_of_where_the_disk_fails_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / METRICS).write_text(json.dumps(record(1)) + "\nno record\n")
    sink = MetricsFile()
    sink.open(FakeRun(tmp_path, Progress(step=1)))  # type: ignore[arg-type]
    sink.write(record(2))
    sink.close()
    (event,) = events(tmp_path)
    assert "1 line left out that is no record" in event
    told = capsys.readouterr().err
    assert event in told and "could not be brought to disk" in told


@pytest.mark.parametrize(
    ("gone", "words"),
    [({10, 20}, "steps 10 to 20"), ({30}, "step 30"), ({10, 30, 50}, "steps 10 and 30 and 50")],
)
@pytest.mark.parametrize("in_place", [True, False])
def test_lines_that_somebody_takes_out_are_named(
    tmp_path: Path, gone: set[int], words: str, in_place: bool
) -> None:
    written(tmp_path, 10, 20).close()
    sink, path = MetricsFile(), tmp_path / METRICS
    sink.open(FakeRun(tmp_path, Progress(step=20)))  # type: ignore[arg-type]
    for step in (30, 40, 50):
        sink.write(record(step))
    stay = [line for line in path.read_text().splitlines() if json.loads(line)["step"] not in gone]
    if not in_place:
        path.unlink()
    path.write_text("".join(f"{line}\n" for line in stay))
    for step in (60, 70):
        sink.write(record(step))
    sink.close()
    (event,) = events(tmp_path)
    assert event.endswith(f"; train records of {words} are missing")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["step"] for one in found if one["kind"] == "train"] == [
        step for step in range(10, 71, 10) if step not in gone
    ]


def test_a_copy_made_of_hard_links_keeps_its_contents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``cp -al`` makes them, while the run writes."""
    run = tmp_path / "run"
    run.mkdir()
    sink = opened(run)
    for step in (1, 2, 3):
        sink.write(record(step))
        os.link(run / METRICS, tmp_path / f"copy{step}")
    sink.rewind(FakeRun(run, Progress(step=2)))  # type: ignore[arg-type]
    sink.write(record(3))
    sink.close()
    assert lines(run) == [1, 2, 3] and events(run) == [] and capsys.readouterr().err == ""
    for step in (1, 2, 3):
        copy = (tmp_path / f"copy{step}").read_text().splitlines()
        assert [json.loads(line)["step"] for line in copy] == list(range(1, step + 1))


def test_a_copy_keeps_its_contents_where_the_file_cannot_be_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sink = written(run, 1, 2)
    os.link(run / METRICS, tmp_path / "copy")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        sink.write(record(3))
    assert (tmp_path / "copy").read_text() == (run / METRICS).read_text()
    sink.write(record(4))
    sink.close()
    assert lines(run) == [1, 2, 3, 4] and len((tmp_path / "copy").read_text().splitlines()) == 2


def test_a_copy_made_while_the_file_is_written_anew_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    written(run, 1).close()
    with monkeypatch.context() as patch:
        patch.setattr(records, "fsync_folder", lambda _: os.link(run / METRICS, copy))
        sink = MetricsFile()
        sink.open(FakeRun(run, Progress(step=1)))  # type: ignore[arg-type]
    sink.write(record(2))
    sink.close()
    assert lines(run) == [1, 2] and len(copy.read_text().splitlines()) == 1
