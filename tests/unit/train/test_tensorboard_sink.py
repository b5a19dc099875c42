"""What TensorBoard shows after steps have come again: what metrics.jsonl says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.evaluate.metrics_file import read_metrics
from megatron_lpa.records import Record
from megatron_lpa.run_folder import TENSORBOARD
from megatron_lpa.train.callbacks.sinks import MetricsFile
from megatron_lpa.train.callbacks.tensorboard import TensorBoard


class Started:
    """A start of a run from a step, with its two sinks."""

    def __init__(self, folder: Path, step: int) -> None:
        self.run: Any = SimpleNamespace(folder=folder, progress=Progress(step=step), lock=None)
        self.sinks = [MetricsFile(), TensorBoard()]
        for sink in self.sinks:
            sink.look(self.run)
        for sink in self.sinks:
            sink.open(self.run)

    def write(self, kind: str, step: int, loss: float | None) -> None:
        record: Record = {
            "kind": kind,
            "step": step,
            "time": 1e9 + step,
            "tokens": 8,
            "step_ms": 1.0,
            "loss": loss,
        }
        for sink in self.sinks:
            sink.write(record)

    def train(self, *steps: int, base: float) -> None:
        for step in steps:
            self.write("train", step, base + step)

    def rewind(self, step: int) -> None:
        self.run.progress = Progress(step=step)
        for sink in self.sinks:
            sink.rewind(self.run)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / TENSORBOARD))
    events.Reload()
    losses = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if tag.endswith("/loss")}
    return {tag: [(event.step, event.value) for event in found] for tag, found in losses.items() if found}


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(folder):
        if record["loss"] is not None:
            found.setdefault(f"{record['kind']}/loss", []).append((record["step"], record["loss"]))
    return found


def test_after_going_back_there_is_one_history(tmp_path: Path) -> None:
    started = Started(tmp_path, 0)
    started.train(1, 2, 3, 4, base=100.0)
    started.write("valid", 4, 150.0)
    started.write("train", 5, None)
    started.rewind(2)
    started.train(3, 4, base=200.0)
    started.rewind(3)
    started.train(4, 5, 6, base=300.0)
    started.close()
    assert shown(tmp_path) == recorded(tmp_path)
    assert shown(tmp_path)["train/loss"] == [
        (1, 101.0),
        (2, 102.0),
        (3, 203.0),
        (4, 304.0),
        (5, 305.0),
        (6, 306.0),
    ]


def test_a_start_from_an_earlier_checkpoint_leaves_one_history(tmp_path: Path) -> None:
    first = Started(tmp_path, 0)
    first.train(1, 2, 3, 4, base=100.0)
    for sink in first.sinks:
        sink.flush()  # and is killed
    second = Started(tmp_path, 2)
    second.train(3, base=200.0)
    second.close()
    third = Started(tmp_path, 3)
    third.train(4, base=300.0)
    third.close()
    assert shown(tmp_path) == recorded(tmp_path)
    assert shown(tmp_path)["train/loss"] == [(1, 101.0), (2, 102.0), (3, 203.0), (4, 304.0)]


def test_tests_of_a_run_that_is_made_longer_stay(tmp_path: Path) -> None:
    first = Started(tmp_path, 0)
    first.train(1, 2, base=100.0)
    first.write("test", 2, 5.0)
    first.close()
    longer = Started(tmp_path, 2)
    longer.train(3, base=100.0)
    longer.write("test", 3, 4.0)
    longer.close()
    assert shown(tmp_path) == recorded(tmp_path)
    assert shown(tmp_path)["test/loss"] == [(2, 5.0), (3, 4.0)]
