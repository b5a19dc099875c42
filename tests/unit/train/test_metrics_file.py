"""The metrics file where the disk is full for a while, and where somebody else has his hands on it."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa import files, records
from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.errors import TryAgain
from megatron_lpa.run_folder import METRICS
from megatron_lpa.train import run_lock
from megatron_lpa.train.callbacks import sinks
from megatron_lpa.train.callbacks.sinks import MetricsFile
from megatron_lpa.train.run_lock import RunLock


@dataclass
class FakeRun:
    folder: Path
    progress: Progress = field(default_factory=Progress)
    lock: RunLock | None = None


def record(step: int, kind: str = "train") -> dict[str, Any]:
    return {"kind": kind, "step": step, "tokens": 8 * step, "loss": 0.5, "step_ms": 9.0}


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


def test_records_wait_and_come_in_order_once_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip  # noqa: E501
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
    real = sinks.keep_records

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks, "keep_records", full)
    sink.rewind(FakeRun(tmp_path, Progress(step=2)))  # type: ignore[arg-type]
    sink.write(record(3, "event"))
    sink.rewind(FakeRun(tmp_path, Progress(step=1)))  # type: ignore[arg-type]
    sink.write(record(2))
    assert lines(tmp_path) == [1, 2, 3]
    monkeypatch.setattr(sinks, "keep_records", real)
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


def events(folder: Path) -> list[str]:
    found = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [record["message"] for record in found if "message" in record]


def written(folder: Path, *steps: int) -> MetricsFile:
    sink = opened(folder)
    for step in steps:
        sink.write(record(step))
    return sink


def test_a_file_that_is_removed_comes_back_with_all_its_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = written(tmp_path, 1, 2)
    (tmp_path / METRICS).unlink()
    sink.write(record(3))
    sink.write(record(4))
    sink.close()
    assert lines(tmp_path) == [1, 2, 2, 3, 4]
    (event,) = events(tmp_path)
    assert event.endswith("was removed, and is written again with all its records")
    assert event in capsys.readouterr().err


def test_what_the_disk_no_longer_has_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file server, where an open file that is removed is gone."""
    sink = written(tmp_path, 1, 2)
    (tmp_path / METRICS).unlink()

    def stale(*_: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(sinks.os, "pread", stale)
    sink.write(record(3))
    sink.close()
    assert lines(tmp_path) == [2, 3]
    assert "was removed; train records of steps 1 to 2 are missing" in events(tmp_path)[0]


@pytest.mark.parametrize(
    ("kept_lines", "torn", "missing"), [(3, "", None), (1, "", 1), (1, '{"kind": "tra', 1), (0, "", 0)]
)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_that_is_cut_or_replaced_says_what_is_missing(
    tmp_path: Path, kept_lines: int, torn: str, missing: int | None, in_place: bool
) -> None:
    sink, path = written(tmp_path, 1, 2, 3), tmp_path / METRICS
    text = "".join(path.read_text().splitlines(keepends=True)[:kept_lines]) + torn
    if not in_place:
        path.unlink()
    path.write_text(text)
    sink.write(record(4))
    sink.write(record(5))
    sink.close()
    changed = not (in_place and missing is None)
    assert lines(tmp_path) == [*range(1, kept_lines + 1), *([3] if changed else []), 4, 5]
    assert len(events(tmp_path)) == changed
    if missing is not None:
        assert f"; train records of steps {missing + 1} to 3 are missing" in events(tmp_path)[0]


@pytest.mark.parametrize("kind", ["symbolic", "hard", "pipe"])
def test_no_record_goes_where_a_link_leads(tmp_path: Path, kind: str) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    sink, path = written(run, 1, 2), run / METRICS
    outside.write_text("of somebody else\n")
    path.unlink()
    {
        "symbolic": path.symlink_to,
        "hard": lambda target: os.link(target, path),
        "pipe": lambda _: os.mkfifo(path),
    }[kind](outside)
    sink.write(record(3))
    sink.rewind(FakeRun(run, Progress(step=2)))  # type: ignore[arg-type]
    sink.write(record(3))
    sink.close()
    assert outside.read_text() == "of somebody else\n"
    assert path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
    assert lines(run)[-1] == 3


def test_a_line_that_could_not_be_taken_back_is_before_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = written(tmp_path, 1)
    real = sink._file

    class Stubborn(FullDisk):
        def truncate(self, size: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

    sink._file = Stubborn(real, free_bytes=10)  # type: ignore[assignment]
    sink.write(record(2))
    assert (tmp_path / METRICS).read_text().splitlines()[-1] == json.dumps(record(2))[:10]
    sink._file = real
    sink.write(record(3))
    sink.close()
    assert lines(tmp_path) == [1, 2, 3] and events(tmp_path) == []


def test_nothing_is_written_once_the_folder_is_another_runs(tmp_path: Path) -> None:
    lock = run_lock.lock_run(tmp_path)
    sink = MetricsFile()
    sink.open(FakeRun(tmp_path, lock=lock))  # type: ignore[arg-type]
    sink.write(record(1))
    (tmp_path / ".lock").unlink()
    with run_lock.lock_run(tmp_path):
        with pytest.raises(TryAgain, match="another run has taken this folder over"):
            sink.write(record(2))
        (tmp_path / METRICS).unlink()
        with pytest.raises(TryAgain):
            sink.close()
        assert not (tmp_path / METRICS).exists()
    lock.close()


DAMAGED = [
    b'{"kind": "train", "step": 2, "loss": "\xff"}', b'{"kind": "train", "step": "2"}', b'{"kind": "train", "step": null}',  # noqa: E501
    b'{"kind": "train", "step": [2]}', b'{"kind": "train", "step": NaN}', b'{"kind": "train", "step": true}',
    b'{"kind": "train", "step": 1e400}', b'{"kind": "train", "step": -1}', b'{"kind": "train"}', b'{"step": 2}',  # noqa: E501
    b'{"kind": ["train"], "step": 2}', b"[2]", b'{"kind": "train", "step": 2, "tokens": 9, "step_ms": 1}',
    b'{"kind": "valid", "step": 2, "tokens": "9", "loss": 1}', b"2", b"\0" * 30, b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}",  # noqa: E501
    b'{"kind": "tra{"kind": "train", "step": 2}', b" " + b"x" * records.MOST_RECORD_BYTES,
]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: line[:40].decode(errors="replace"))
def test_a_damaged_line_is_set_aside_and_the_run_goes_on(
    tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [json.dumps(record(step)).encode() for step in (1, 3, 9)]
    text = b"\n".join([before[0], line, before[1], before[2], b'{"kind": "tr'])
    (tmp_path / METRICS).write_bytes(text)
    for _ in range(2):
        sink = MetricsFile()
        sink.open(FakeRun(tmp_path, Progress(step=5)))  # type: ignore[arg-type]
        assert (tmp_path / METRICS).read_bytes().splitlines()[:2] == before[:2], "byte for byte"
        sink.write(record(6))
        sink.close()
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == text
    assert not (tmp_path / "metrics.damaged.2.jsonl").exists()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert (
        f"{METRICS}: 1 line left out that is no record (line 2: " in told and "metrics.damaged.jsonl" in told
    )
    assert told.strip().removeprefix("warning: ") in events(tmp_path)


def test_each_damaged_file_is_kept(tmp_path: Path) -> None:
    for content in (b"first\n", b"second\n" * 5):
        (tmp_path / METRICS).write_bytes(content)
        opened(tmp_path).close()
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == b"first\n"
    assert (tmp_path / "metrics.damaged.2.jsonl").read_bytes() == b"second\n" * 5
    assert "5 lines left out that are no record (line 1: " in events(tmp_path)[0]
    assert "and 2 more); the file as it was is metrics.damaged.2.jsonl" in events(tmp_path)[0]


def test_a_file_that_the_disk_does_not_give_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, 1, 2).close()
    before = (tmp_path / METRICS).read_bytes()
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))
    real, failures = files.open_regular, [errno.EIO]

    def failing(path: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        return real(path)

    monkeypatch.setattr(records, "open_regular", failing)
    opened(tmp_path).close()
    assert (tmp_path / METRICS).read_bytes() == b"", "a hiccup is not noticed; a run from step 0 repeats all"
    (tmp_path / METRICS).write_bytes(before)
    failures += [errno.EIO] * 2
    with pytest.raises(TryAgain, match=r"metrics\.jsonl: cannot be read"):
        opened(tmp_path)
    assert (tmp_path / METRICS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_a_long_file_is_not_held_in_memory(tmp_path: Path) -> None:
    line = json.dumps(record(1) | {"pad": "x" * 1000}) + "\n"
    (tmp_path / METRICS).write_text(line * 40_000)
    tracemalloc.start()
    kept = records.keep_records(tmp_path / METRICS, lambda record: True, "aside.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20 < len(line) * 40_000
    assert kept.last_step == 1 and (tmp_path / METRICS).stat().st_size == len(line) * 40_000


def test_a_file_system_that_tells_no_file_from_another_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks.os.path, "samestat", lambda *_: False)
    sink = written(tmp_path, 1, 2)
    sink.write(record(3))
    assert lines(tmp_path) == [1, 2, 3]
    (tmp_path / METRICS).unlink()
    sink.write(record(4))
    sink.close()
    assert lines(tmp_path) == [1, 2, 3, 3, 4]


def test_what_is_said_to_be_missing_was_there(tmp_path: Path) -> None:
    """The run goes on at a step later than that of its last record, or earlier, and nothing is missing."""
    written(tmp_path, 1, 2).close()
    sink, path = MetricsFile(), tmp_path / METRICS
    sink.open(FakeRun(tmp_path, Progress(step=5)))  # type: ignore[arg-type]

    def replace_it() -> None:
        path.with_name("copy").write_bytes(path.read_bytes())
        os.replace(path.with_name("copy"), path)

    replace_it()
    for step in (6, 7):
        sink.write(record(step))
    sink.rewind(FakeRun(tmp_path, Progress(step=2)))  # type: ignore[arg-type]
    replace_it()
    sink.write(record(3))
    sink.close()
    assert len(events(tmp_path)) == 2 and "missing" not in "".join(events(tmp_path))


def test_a_file_that_goes_while_a_line_is_written_is_no_end(tmp_path: Path) -> None:
    """As on a file server where another machine removes it: writing fails first, and so does what follows."""
    sink = written(tmp_path, 1)

    class Stale(FullDisk):
        gone = False

        def write(self, data: bytes = b"") -> int:
            raise OSError(errno.ESTALE, "Stale file handle")

        def fileno(self) -> int:
            return self.write() if self.gone else int(self.file.fileno())

    sink._file = stale = Stale(sink._file, free_bytes=0)  # type: ignore[assignment]
    sink.write(record(2))
    (tmp_path / METRICS).unlink()
    stale.gone = True
    sink.write(record(3))
    sink.close()
    assert lines(tmp_path) == [1, 2, 3]
    assert "was removed; train records of step 1 are missing" in events(tmp_path)[0]
