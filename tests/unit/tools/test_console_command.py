"""``megatron-lpa``: the tools as sub-commands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lpa import __main__, __version__

ROOT = Path(__file__).parents[3]
TOOLS = {path.stem for path in (ROOT / "tools").glob("*.py")}
OF_A_CHECKOUT = {"demo", "demo_commands", "chaos", "benchmark", "snapshot_run", "health_check"}


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the console command."""
    monkeypatch.setattr(sys, "argv", ["megatron-lpa", *arguments])
    try:
        return __main__.console()
    except SystemExit as end:
        return int(end.code or 0)


def test_help_names_every_command_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^  (\w+) +\S.*$", shown.partition("positional")[0], re.MULTILINE)
    assert set(listed) == {"pretrain"} | TOOLS - OF_A_CHECKOUT and len(listed) == len(set(listed))
    assert all(name in shown for name in OF_A_CHECKOUT - {"demo_commands"})


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"megatron-lpa {__version__}\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["plam"], "no command 'plam'; did you mean plan?"),
        (["preproces-data", "--input", "a"], "no command 'preproces-data'; did you mean preprocess_data?"),
        (["xyz"], "no command 'xyz'\n"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_what_is_no_command_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert called(monkeypatch, *given) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["merge_datasets", "merge-datasets"])
def test_a_commands_help_speaks_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert called(monkeypatch, name, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: megatron-lpa merge_datasets ") and "tools/" not in shown
    assert "    megatron-lpa merge_datasets --input data/a_text_document" in shown


def test_the_module_is_the_command_too() -> None:
    command = [sys.executable, "-m", "megatron_lpa", "plan", "--preset", "tiny/lpa", "--gpus", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (78, "") and done.stderr.startswith("error: ")


@pytest.mark.parametrize("name", sorted(TOOLS - OF_A_CHECKOUT))
def test_a_tool_is_its_command(name: str) -> None:
    tree = ast.parse((ROOT / "tools" / f"{name}.py").read_text())
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert (imported[-1].module, imported[-1].names[0].name) == (f"megatron_lpa.commands.{name}", "main")
    assert len(tree.body) == 5 and (ROOT / "megatron_lpa" / "commands" / f"{name}.py").exists()
