"""How all tools end when nobody reads them, and how they take several runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lpa.command_line import run_folders
from megatron_lpa.errors import UserError

ROOT = Path(__file__).parents[3]
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text())
PLAN = [str(ROOT / "tools" / "plan.py"), "--preset", "tiny/lpa", "--json"]


def unread(command: list[str], unbuffered: bool, both: bool) -> subprocess.CompletedProcess[str]:
    """With a closed pipe in place of its output."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    try:
        return subprocess.run(
            [sys.executable, *command], env=environment, text=True,
            stdout=writer, stderr=writer if both else subprocess.PIPE,
        )  # fmt: skip
    finally:
        os.close(writer)


@pytest.mark.parametrize("unbuffered", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_a_tool_that_nobody_reads_ends_without_a_word(unbuffered: bool, both: bool) -> None:
    done = unread(PLAN, unbuffered, both)
    assert done.returncode == 128 + signal.SIGPIPE and not done.stderr


@pytest.mark.parametrize("options", [["--help"], ["--print-config"]])
def test_what_the_entry_point_lists_may_go_unread_too(options: list[str]) -> None:
    done = unread(["-m", "megatron_lpa.pretrain", *options], False, False)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("command", [PLAN, ["-m", "megatron_lpa.pretrain", "--print-config"]])
@pytest.mark.parametrize("unbuffered", [True, False])
def test_output_that_finds_no_room_is_one_line(command: list[str], unbuffered: bool) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *command], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "error: what this command prints cannot be written (No space left on device)\n"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_every_tool_ends_so(tool: Path) -> None:
    """What one of them does here, all do: they end through the same function."""
    assert tool.read_text().endswith(("run_tool(main))\n", "run_tool(lambda: main(sys.argv[1:])))\n"))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a2", "a10", "b", "odd[1]"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "runs" / "no run").mkdir()
    (tmp_path / "runs" / "a.log").touch()
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([["runs/b", "runs/a2"]], ["b", "a2"]),
        ([["runs/b"], ["runs/a2", "runs/a10"]], ["b", "a2", "a10"]),
        ([["runs/a*"]], ["a2", "a10"]),
        ([["runs/*"]], ["a2", "a10", "b", "odd[1]"]),
        ([["runs/a10", "runs/a*"], ["runs/?"]], ["a10", "a2", "b"]),
        ([["runs/odd[1]"]], ["odd[1]"]),
        ([["runs/[ab]2"]], ["a2"]),
        ([["runs/absent"]], ["absent"]),
        (["runs/b", "runs/a2"], ["b", "a2"]),
    ],
)
def test_runs_are_given_one_by_one_together_or_by_patterns(
    runs: Path, given: list[list[str]], expected: list[str]
) -> None:
    assert run_folders(given) == [Path("runs", name) for name in expected]


@pytest.mark.parametrize("pattern", ["runs/z*", "runs/*.log", "runs/no*"])
def test_a_pattern_without_runs_is_an_error(runs: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"--run .* no run folder fits this pattern"):
        run_folders([[pattern]])


def test_checkpoints_fit_patterns_too(runs: Path) -> None:
    for step in (10, 9):
        folder = runs / "b" / "checkpoints" / f"step_{step:08}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({}))
    found = run_folders([["runs/b/checkpoints/step_*"]])
    assert [path.name for path in found] == ["step_00000009", "step_00000010"]
