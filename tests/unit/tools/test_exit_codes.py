"""What every tool ends with when its input is bad: the codes of ``errors.py``, and one line that says why."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa import pretrain
from megatron_lpa.command_line import command
from megatron_lpa.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_USAGE, TryAgain, UserError
from megatron_lpa.parallel import address

ROOT = Path(__file__).parents[3]
TOOLS = {path.stem: path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()}
BAD = {
    "benchmark": ["preprocess", "--quick", "--input", "none.jsonl", "--tokenizer", "none"],
    "chaos": ["--merge", "none.json"],
    "convert_checkpoint": ["none", "--output", "new"],
    "demo": ["--folder", "a.txt/demo"],
    "evaluate": ["--run", "none", "--split", "valid"],
    "generate": ["--run", "none"],
    "health_check": ["judge", "a node that does not report"],
    "inspect_dataset": ["none"],
    "merge_datasets": ["--input", "none", "--output-prefix", "new"],
    "plan": ["--preset", "tiny/none"],
    "plot_curves": ["--run", "none", "--output", "new.png"],
    "preprocess_data": ["--input", "none.jsonl", "--tokenizer", "none", "--output-prefix", "new"],
    "report": ["--run", "none"],
    "run_status": ["none"],
    "snapshot_run": ["--processes", "1", "--preset", "tiny/none"],
    "train_tokenizer": ["--input", "none.jsonl", "--output", "new"],
}
"""What no tool can use, and only somebody can mend."""
MAY_BE_GONE = {"health_check"}
"""A node that is not ready may be so later."""


def main_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS[name])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_input_that_somebody_has_to_mend(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    (tmp_path / "a.txt").touch()
    code = main_of(name, monkeypatch)(BAD[name])
    told = capsys.readouterr()
    assert code == (EXIT_FAILED if name in MAY_BE_GONE else EXIT_REFUSED), told
    assert told.err.splitlines()[-1].startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"], "nothing is left behind"


@pytest.mark.parametrize("name", sorted({*TOOLS} - {"plan", "snapshot_run", "health_check"}))
def test_options_that_a_tool_does_not_have(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        main_of(name, monkeypatch)([*BAD[name], "--no-such-option"])
    assert end.value.code == EXIT_USAGE


def test_training_and_the_search_for_a_port_end_so_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(["--preset", "tiny/none"]) == EXIT_REFUSED
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"exit code {EXIT_REFUSED}: ")
    assert address.main(["99999999"]) == EXIT_REFUSED
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("a"), EXIT_REFUSED, "error: a\n"),
        (TryAgain("50 %s"), EXIT_FAILED, "error: 50 %s\n"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "stopped; go on\n"),
    ],
)
def test_the_class_of_an_error_decides(
    raised: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command("stopped; go on")
    def main(_: Any) -> int:
        raise raised

    assert main([]) == code and capsys.readouterr().err == line


def test_levels_are_the_beginnings_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("megatron_lpa.any")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "note: 100 %")
    assert capsys.readouterr() == ("", "note: 100 %\nwarning: note: 100 %\nerror: note: 100 %\n")


def test_who_imports_the_package_gets_no_handlers() -> None:
    code = (
        "import json, logging\n"
        "import megatron_lpa, megatron_lpa.pretrain, megatron_lpa.commands.plan\n"
        "package = logging.getLogger('megatron_lpa')\n"
        "print(json.dumps([package.handlers, logging.getLogger().handlers, package.level, "
        "package.propagate]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], [], 0, True]


def test_every_logger_is_of_the_package() -> None:
    """Its name has to be spelt out where a module is run by itself, as ``__main__``."""
    for path in [*(ROOT / "megatron_lpa").rglob("*.py"), *TOOLS.values()]:
        source = path.read_text()
        if "logger = logging.getLogger(" in source and path.name != "command_line.py":
            by_itself = 'if __name__ == "__main__"' in source
            assert ("logging.getLogger(__name__)" not in source) == by_itself, path
            assert by_itself == ('logging.getLogger("megatron_lpa.' in source), path
