"""Which W&B run a run folder writes to, and that its history is that of metrics.jsonl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.wandb_files import history_of, tags_of

from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.run_folder import METRICS, SUPERSEDED, WANDB, WANDB_ID
from megatron_lpa.train.callbacks import weights_and_biases
from megatron_lpa.train.callbacks.weights_and_biases import WandB, is_copy, read_identity

PROGRAM = """
import sys
from pathlib import Path
from types import SimpleNamespace
from megatron_lpa.config import load_config
from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.train.callbacks.sinks import MetricsFile
from megatron_lpa.train.callbacks.weights_and_biases import WandB

folder = Path(sys.argv[1])
config = load_config(["--preset", "tiny/lpa", "--data.prefix", "d"])

class Start:
    def __init__(self, step):
        self.run = SimpleNamespace(folder=folder, config=config, progress=Progress(step=step), lock=None)
        self.sinks = [MetricsFile(), WandB("offline")]
        for sink in self.sinks:
            sink.look(self.run)
        for sink in self.sinks:
            sink.open(self.run)

    def train(self, *steps, base, kind="train"):
        for step in steps:
            record = {"kind": kind, "step": step, "time": 1.0, "tokens": 8, "step_ms": 1.0, "loss": base + step}
            for sink in self.sinks:
                sink.write(record)
        return self

    def rewind(self, step):
        self.run.progress = Progress(step=step)
        for sink in self.sinks:
            sink.rewind(self.run)
        return self

    def close(self):
        for sink in self.sinks:
            sink.close()

exec(sys.argv[2])
"""  # noqa: E501


def start(folder: Path, code: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), code], env=environment, capture_output=True, text=True, timeout=240  # noqa: E501
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def to_sync(folder: Path) -> list[Path]:
    return sorted((folder / WANDB).glob("offline-run-*"))


def recorded(folder: Path) -> list[tuple[int, float]]:
    found = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in found if record["kind"] == "train"]


def test_what_is_synced_is_the_final_history(tmp_path: Path) -> None:
    """Of a run that goes back, is started again from an earlier step, and then just goes on."""
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    folder.mkdir()
    start(
        folder,
        "Start(0).train(1, 2, 3, base=100.0).rewind(1).train(2, 3, base=200.0).close()\n"
        "Start(2).train(3, base=300.0).train(3, base=0.0, kind='test').close()\n"
        "Start(3).train(4, base=400.0).close()",
    )
    former = sorted((folder / SUPERSEDED).iterdir(), key=lambda path: history_of(path, "train/loss"))
    assert [history_of(each, "train/loss") for each in former] == [
        [(1, 101.0), (2, 102.0), (3, 103.0)],
        [(1, 101.0), (2, 202.0), (3, 203.0)],
    ]
    parts = to_sync(folder)
    assert [history_of(part, "train/loss") for part in parts] == [
        [(1, 101.0), (2, 202.0), (3, 303.0)],
        [(4, 404.0)],
    ]
    assert [value for part in parts for value in history_of(part, "train/loss")] == recorded(folder)
    assert [value for part in parts for value in history_of(part, "test/loss")] == [(3, 3.0)]
    identity = read_identity(folder)
    assert identity is not None and all(identity.id in part.name for part in parts)
    assert [tags_of(each) for each in (*former, *parts)] == [{"superseded"}, set(), set(), set()]


def chosen(folder: Path, step: int = 0) -> str:
    """The id that a start would use; it begins the W&B run."""
    sink, run = WandB("offline"), SimpleNamespace(folder=folder, progress=Progress(step=step))
    sink._started = lambda *_: SimpleNamespace(log=lambda *_, **__: None)  # type: ignore[method-assign]
    sink.look(run)  # type: ignore[arg-type]
    sink._begin(run)  # type: ignore[arg-type]
    identity = read_identity(folder)
    assert identity is not None and identity.complete
    return identity.id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    return path


def test_a_copy_gets_a_run_of_its_own_and_what_is_moved_goes_on(folder: Path) -> None:
    own = chosen(folder)
    copy = folder.with_name("b")
    for name in (f"offline-run-1-{own}", f"offline-run-1-{own}-1", f"offline-run-1-{own}2"):
        (folder / WANDB / name).mkdir(parents=True)
    shutil.copytree(folder, copy)
    of_copy = chosen(copy)
    assert of_copy != own and chosen(copy) == of_copy and chosen(folder) == own
    # What the copy has of the original would be synced into it.
    assert [path.name for path in to_sync(copy)] == [f"offline-run-1-{own}2"] and len(to_sync(folder)) == 3
    moved = folder.parent / "elsewhere" / "c"
    moved.parent.mkdir()
    folder.rename(moved)
    assert chosen(moved) == own
    shutil.copytree(moved, folder)
    assert chosen(folder) != own and chosen(moved) == own


def test_a_folder_that_comes_from_another_machine_is_a_copy_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = chosen(folder)
    moved = shutil.copytree(folder, folder.with_name("b"))
    shutil.rmtree(folder)
    identity = read_identity(moved)
    assert identity is not None and identity.id == own
    assert not is_copy(identity, moved), "moved to another file system, on this machine"
    monkeypatch.setattr(weights_and_biases.socket, "gethostname", lambda: "another")
    assert is_copy(identity, moved)


def test_a_copy_of_a_folder_that_has_gone_on_to_another_run_is_one(folder: Path) -> None:
    own = chosen(folder)
    copy = shutil.copytree(folder, folder.with_name("b"))
    (folder / WANDB_ID).write_text((folder / WANDB_ID).read_text().replace(own, "0123abcd"))
    identity = read_identity(copy)
    assert identity is not None and identity.id == own and is_copy(identity, copy)


def test_a_link_to_a_run_folder_is_no_copy(folder: Path) -> None:
    own = chosen(folder)
    (folder.parent / "link").symlink_to(folder)
    assert chosen(folder.parent / "link") == own


def test_an_id_of_an_earlier_version_is_used(folder: Path) -> None:
    (folder / WANDB_ID).write_text("0123abcd")
    assert chosen(folder) == "0123abcd"
    assert json.loads((folder / WANDB_ID).read_text())["path"] == str(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"id": 5}', '{"id": "../x"}', '{"id": "a", "more": 1}', "a b"]
)
def test_an_id_that_is_none_is_replaced(folder: Path, content: str) -> None:
    (folder / WANDB_ID).write_text(content)
    assert len(chosen(folder)) == 8


def test_records_that_come_again_take_another_run(folder: Path) -> None:
    def line(kind: str, step: int) -> str:
        figures: dict[str, Any] = {"tokens": 8, "loss": 1.0, "step_ms": 1.0}
        return json.dumps({"kind": kind, "step": step, "time": 1.0, "blocked_s": 1.0, **figures}) + "\n"

    own = chosen(folder)
    (folder / METRICS).write_text(line("train", 4) + line("event", 7) + line("test", 4))
    assert chosen(folder, step=4) == own
    assert chosen(folder, step=3) != own


def test_a_run_that_was_killed_before_it_had_all_records_is_not_gone_on_with(folder: Path) -> None:
    own = chosen(folder)
    (folder / METRICS).write_text('{"kind": "train", "step": 4, "tokens": 8, "loss": 1.0, "step_ms": 1.0}\n')
    sink, run = WandB("offline"), SimpleNamespace(folder=folder, progress=Progress(step=2))
    sink.look(run)  # type: ignore[arg-type]
    (folder / METRICS).write_text("")  # as the metrics file does; and is killed
    assert read_identity(folder).complete is False  # type: ignore[union-attr]
    assert chosen(folder, step=2) not in (own, sink._identity.id)  # type: ignore[union-attr]


def test_online_the_former_run_gets_a_tag(folder: Path) -> None:
    begun: list[Any] = []

    def started(_: Any, wandb_id: str) -> Any:
        begun.append(SimpleNamespace(id=wandb_id, tags=("mine",), log=print, finish=lambda: None))
        return begun[-1]

    own = chosen(folder)
    (folder / METRICS).write_text('{"kind": "train", "step": 4, "tokens": 8, "loss": 1.0, "step_ms": 1.0}\n')
    sink, run = WandB("online"), SimpleNamespace(folder=folder, progress=Progress(step=2))
    sink._started = started  # type: ignore[method-assign]
    sink.look(run)  # type: ignore[arg-type]
    sink.open(run)  # type: ignore[arg-type]
    sink.rewind(run)  # type: ignore[arg-type]
    assert begun[0].id == own and len({each.id for each in begun}) == 3
    assert [each.tags for each in begun] == [("mine", "superseded"), ("mine", "superseded"), ("mine",)]
