"""``tools/health_check.py``: what keeps a node from training, and who says so."""

from __future__ import annotations

import errno
import json
import runpy
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.hiccups import first_looks_fail

from megatron_lpa.config import load_config
from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter

TOOL = Path(__file__).resolve().parents[2] / "tools" / "health_check.py"
FACTS = {"torch": "2.13.0", "GPU": "NVIDIA A800"}


@pytest.fixture(scope="module")
def tool() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(TOOL)))


def report(node: str, ahead_s: float = 0.0, problem: str | None = None, **facts: str) -> list[str]:
    """The lines of one node."""
    lines: list[dict] = [{"node": node, "time": time.time() + ahead_s}]
    if problem is not None:
        lines.append({"node": node, "problem": problem})
    lines.append({"node": node, "facts": FACTS | facts})
    return [json.dumps(line) + "\n" for line in lines]


def test_nodes_that_agree_can_train(tool: SimpleNamespace) -> None:
    lines = ["a warning of a library\n", *report("a"), *report("b")]
    assert tool.judge(lines, ["a", "b"]) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"problem": "GPU 3 does not work"}, "b: GPU 3 does not work"),
        ({"ahead_s": 100}, "b: its clock is 100 s ahead; set up NTP there"),
        ({"ahead_s": -100}, "b: its clock is 100 s behind; set up NTP there"),
        ({"torch": "2.12.0"}, "torch differs: 2.13.0 on a; 2.12.0 on b"),
    ],
)
def test_every_problem_names_its_node(tool: SimpleNamespace, changes: dict[str, Any], problem: str) -> None:
    assert tool.judge([*report("a"), *report("b", **changes)], ["a", "b"]) == [problem]


@pytest.mark.parametrize("lines", [0, 1])
def test_a_node_that_does_not_report_to_the_end(tool: SimpleNamespace, lines: int) -> None:
    problems = tool.judge([*report("a"), *report("b")[:lines]], ["a", "b"])
    assert problems == ["b: did not report; look above for what it said"]


def test_a_line_nested_without_end_is_no_report(
    tool: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.judge([*report("a"), "[" * 1_000_000 + "\n"], ["a"]) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("line 3: '[[[") and "nested too deeply" in line and len(line) < 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time", "x"), ("time", None), ("time", True), ("time", [1]), ("time", float("nan")), ("time",
        10**400),
        ("node", []), ("node", 7), ("node", "n\nerror: y"), ("problem", {"a": 1}), ("facts", []), ("facts",
        "x"), ("facts", {"torch": []}),
        ("facts", "x\nerror: y" * 10_000),
    ],
)  # fmt: skip
def test_a_report_that_no_node_writes_is_a_problem_in_one_line(
    tool: SimpleNamespace, key: str, value: Any
) -> None:
    (problem,) = tool.judge([*report("a"), json.dumps({"node": "n", key: value}) + "\n"], ["a"])
    assert problem.startswith("line 3: ") and problem.endswith(f" is no {key} of a report")
    assert problem.isprintable() and len(problem) < 200


def test_the_judge_ends_with_1_and_says_why(
    tool: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", report("a", problem="broken"))
    assert tool.main(["judge", "a"]) == 1
    assert capsys.readouterr().err == "error: a: broken\n"
    monkeypatch.setattr("sys.stdin", report("a"))
    assert tool.main(["judge", "a"]) == 0
    assert capsys.readouterr().out == "all 1 nodes can train\n"


def test_a_node_reports_in_short_lines_whatever_happens(
    tool: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert tool.main(["node", "--gpus", "0", "--model.hiden_size", "8" * 2000]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 1000
    (problem,) = tool.judge(lines, ["node7"])
    assert problem.startswith("node7: UserError: unknown option --model.hiden_size")


def test_gpus_that_are_not_there(tool: SimpleNamespace) -> None:
    import torch

    count = torch.cuda.device_count() + 1
    assert f"{count - 1} of {count} GPUs are visible to torch" in next(tool.gpu_problems(count))
    assert list(tool.gpu_problems(0)) == []


def test_a_run_folder_that_is_not_shared(tool: SimpleNamespace, tmp_path: Path) -> None:
    config = load_config(
        ["--preset", "tiny/lpa", "--logging.run_dir", str(tmp_path), "--logging.name", "a b"]
    )
    (problem,) = tool.problems_of_node(config, 0)
    assert "does not see" in problem and "all nodes share" in problem
    (tmp_path / "a b" / "snapshot").mkdir(parents=True)
    assert list(tool.problems_of_node(config, 0)) == []


def test_a_folder_that_cannot_be_written(tool: SimpleNamespace, tmp_path: Path) -> None:
    assert list(tool.folder_problems(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []
    (problem,) = tool.folder_problems(tmp_path / "missing")
    assert problem == f"{tmp_path}/missing cannot be written: No such file or directory"


def test_a_disk_too_small_for_the_checkpoints_to_come(
    tool: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        ["--preset", "3b/lpa", "--train.keep_checkpoints", "2", "--train.checkpoint_interval", "0"]
    )

    def free(gigabytes: float) -> None:
        usage = SimpleNamespace(free=int(gigabytes * 1e9))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    free(150)  # three of 48.5 GB
    assert list(tool.disk_problems(tmp_path, config)) == []
    free(140)
    (problem,) = tool.disk_problems(tmp_path, config)
    assert "has 140.0 GB free, but 3 checkpoints of about 48.5 GB are to come" in problem
    # With a checkpoint there, its size counts.
    checkpoint = tmp_path / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "data").write_bytes(b"0" * 10**6)
    free(0.0021)
    assert list(tool.disk_problems(tmp_path, config)) == []
    free(0.0019)
    assert "2 checkpoints of about 0.0 GB" in next(tool.disk_problems(tmp_path, config))
    # A disk that does not answer at once makes no checkpoint smaller.
    with monkeypatch.context() as patched:
        failed = first_looks_fail(patched, tmp_path, errno.ESTALE, ("scandir", "stat", "lstat"))
        assert "2 checkpoints of about 0.0 GB" in next(tool.disk_problems(tmp_path, config))
        assert str(checkpoint) in failed
    # What is no checkpoint does not count, whatever a user called it: copies, links to nothing, those set
    # aside.
    for name in ("step_00000004_backup", "step_copy", "damaged_step_00000012", "step_7"):
        shutil.copytree(checkpoint, checkpoint.with_name(name))
    (checkpoint.parent / "step_00000099").symlink_to("nowhere")
    free(0.0021)
    assert list(tool.disk_problems(tmp_path, config)) == []
    free(0.0019)
    assert "2 checkpoints of about 0.0 GB" in next(tool.disk_problems(tmp_path, config))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (["--train.keep_checkpoints", "2", "--train.checkpoint_interval", "0"], 3),
        # Stops write two after the one at the interval, which stays.
        (["--train.keep_checkpoints", "2", "--train.checkpoint_interval", "50"], 4),
        (["--train.keep_checkpoints", "2", "--train.keep_best", "true"], 5),
        (["--train.keep_checkpoints", "0"], 1),
    ],
)
def test_every_checkpoint_that_a_rule_keeps_needs_room(
    tool: SimpleNamespace, options: list[str], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(["--preset", "3b/lpa", *options])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    (problem,) = tool.disk_problems(tmp_path, config)
    assert f"but {most} checkpoints of about 48.5 GB are to come" in problem


def test_damaged_datasets(tool: SimpleNamespace, tmp_path: Path) -> None:
    good = str(tmp_path / "good")
    with IndexedDatasetWriter(good, np.uint16) as writer:
        writer.add_document(np.arange(10, dtype=np.uint16))
    assert list(tool.dataset_problems(good)) == []
    for suffix in (".bin", ".idx"):
        shutil.copy(good + suffix, str(tmp_path / "short") + suffix)
    with open(tmp_path / "short.bin", "r+b") as stream:
        stream.truncate(10)
    assert "one is cut short" in next(tool.dataset_problems(str(tmp_path / "short")))
    assert "no such file" in next(tool.dataset_problems(str(tmp_path / "none")))
    Path(f"{good}.json").write_text("{")
    assert "not valid JSON" in next(tool.dataset_problems(good))


def test_every_dataset_of_a_run_is_looked_at(tool: SimpleNamespace) -> None:
    assert tool.prefixes_of(DataConfig(blend={"a": 0.5, "b": 0.5})) == ["a", "b"]
    assert tool.prefixes_of(DataConfig(train_prefix="a", valid_prefix="b", test_prefix="c")) == [
        "a",
        "b",
        "c",
    ]
    assert tool.prefixes_of(DataConfig(prefix="a")) == ["a"]
