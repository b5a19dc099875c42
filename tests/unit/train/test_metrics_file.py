"""The metrics file where the disk is full for a while."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa.engine.manifest import Progress
from megatron_lpa.train.callbacks import sinks
from megatron_lpa.train.callbacks.sinks import METRICS, MetricsFile


@dataclass
class FakeRun:
    folder: Path
    progress: Progress = field(default_factory=Progress)


def record(step: int, kind: str = "train") -> dict[str, Any]:
    return {"kind": kind, "step": step, "loss": 0.5}


def lines(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS).read_text().splitlines()]


class FullDisk:
    """A file that takes so many bytes more."""

    def __init__(self, file: Any, free_bytes: int) -> None:
        self.file, self.free_bytes = file, free_bytes

    def write(self, data: bytes) -> int:
        written: int = self.file.write(data[: self.free_bytes])
        self.free_bytes -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def opened(folder: Path) -> MetricsFile:
    sink = MetricsFile()
    sink.open(FakeRun(folder))  # type: ignore[arg-type]
    return sink


def test_records_wait_and_come_in_order_once_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    sink = opened(tmp_path)
    sink.write(record(1))
    real = sink._file
    sink._file = FullDisk(real, free_bytes=10)  # type: ignore[assignment]
    for step in (2, 3, 4):
        sink.write(record(step))
    assert lines(tmp_path) == [1], "no part of a line stays"
    assert capsys.readouterr().err.count("warning: metrics cannot be written, and wait in memory") == 1
    with pytest.raises(OSError, match="No space left"):
        sink.flush()
    sink._file = real
    sink.write(record(5))
    assert lines(tmp_path) == [1, 2, 3, 4, 5]


def test_what_waits_is_dropped_with_the_steps_that_come_again(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink._file = FullDisk(sink._file, free_bytes=0)  # type: ignore[assignment]
    for step, kind in ((1, "train"), (2, "train"), (2, "event")):
        sink.write(record(step, kind))
    sink.rewind(FakeRun(tmp_path, Progress(step=1)))  # type: ignore[arg-type]
    sink.flush()
    assert lines(tmp_path) == [1, 2]
    sink.close()


def test_memory_for_what_waits_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "MOST_WAITING", 3)
    sink = opened(tmp_path)
    sink._file = FullDisk(sink._file, free_bytes=0)  # type: ignore[assignment]
    for step in (1, 2, 3):
        sink.write(record(step))
    with pytest.raises(OSError):
        sink.write(record(4))


def test_going_back_on_a_full_disk_waits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written anew then, which takes room."""
    sink = opened(tmp_path)
    for step in (1, 2, 3):
        sink.write(record(step))
    real = sinks.drop_records_after

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks, "drop_records_after", full)
    sink.rewind(FakeRun(tmp_path, Progress(step=2)))  # type: ignore[arg-type]
    sink.write(record(3, "event"))
    sink.rewind(FakeRun(tmp_path, Progress(step=1)))  # type: ignore[arg-type]
    sink.write(record(2))
    assert lines(tmp_path) == [1, 2, 3]
    monkeypatch.setattr(sinks, "drop_records_after", real)
    sink.write(record(3))
    assert lines(tmp_path) == [1, 3, 2, 3]
    sink.close()


def test_what_waits_is_tried_a_last_time_when_a_run_ends(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    real = sink._file
    sink._file = FullDisk(real, free_bytes=0)  # type: ignore[assignment]
    sink.write(record(1))
    sink._file = real
    sink.close()
    assert lines(tmp_path) == [1]
