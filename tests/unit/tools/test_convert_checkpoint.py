"""``tools/convert_checkpoint.py`` as a user meets it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import flip_bit, manifest_of, random_checkpoint
from support.models import MODELS

from megatron_lpa.commands import convert_checkpoint

TOOL = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"
NAME = "step_00000007"
MODEL = MODELS["s2_lpa"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    random_checkpoint(tmp_path / "run" / "checkpoints", MODEL)
    return tmp_path / "run"


def test_from_a_shell_without_deepspeed(run: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:];\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0 and 'deepspeed' not in sys.modules"
    )
    output = tmp_path / "moved" / NAME
    argv = [str(run), "--output", str(output), "--tensor-parallel-size", "4", "--data-parallel-size", "2"]
    argv += ["--lowdim-layout", "column_row", "--weights-dtype", "fp32"]
    done = subprocess.run([sys.executable, "-c", code, str(TOOL), *argv], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    files = [path for path in output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert re.fullmatch(
        rf"{output}: step 7 of {run}/checkpoints/{NAME} as tensor parallel 4, data parallel 2, column_row; "
        rf"10 files, {size:,} bytes, \d+\.\d s\n",
        done.stdout,
    )
    assert len(files) == 10
    layout = manifest_of(output)["layout"]
    assert isinstance(layout, dict)
    assert (layout["tensor_parallel_size"], layout["data_parallel_size"], layout["lowdim_layout"]) == (
        4,
        2,
        "column_row",
    )


def test_what_is_not_said_stays_as_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_checkpoint.main([str(run / "checkpoints" / NAME), "--output", str(tmp_path / NAME)]) == 0
    assert manifest_of(tmp_path / NAME)["layout"] == manifest_of(run / "checkpoints" / NAME)["layout"]
    assert "tensor parallel 2, data parallel 2, latent; 6 files" in capsys.readouterr().out


def test_to_universal(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "universal"
    assert (
        convert_checkpoint.main([str(run), "--step", "7", "--output", str(output), "--to", "universal"]) == 0
    )
    assert (output / "latest_universal").read_text() == NAME
    files = [path for path in output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert (
        f"as DeepSpeed's universal checkpoint; {len(files)} files, {size:,} bytes" in capsys.readouterr().out
    )


def test_a_newer_damaged_checkpoint_is_a_warning(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_checkpoint(run / "checkpoints", MODEL, 9)
    flip_bit(run / "checkpoints" / "step_00000009" / "state" / "rank_00000.safetensors")
    assert convert_checkpoint.main([str(run), "--output", str(tmp_path / NAME)]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: step_00000009 was passed over: ") and "step 7 of" in shown.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "8"], "holds no complete checkpoint of step 8; it has: 7"),
        (["--tensor-parallel-size", "3"], "--tensor-parallel-size 3 does not divide dimension 0 of"),
        (
            ["--to", "universal", "--weights-dtype", "bf16"],
            "--weights-dtype has no meaning with --to universal",
        ),
        (["--to", "universal", "--data-parallel-size", "1"], "--data-parallel-size has no meaning with"),
    ],
)
def test_errors_are_one_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    assert convert_checkpoint.main([str(run), "--output", str(tmp_path / NAME), *argv]) == 78
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and message in shown.err
    assert shown.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_help_has_an_example_and_needs_no_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:];\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(TOOL), "--help"], capture_output=True, text=True, check=True
    )
    assert "python tools/convert_checkpoint.py runs/tiny-lpa --output moved/step_00000020" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(run: Path, tmp_path: Path, number: int, code: int) -> None:
    """The process sends it to itself in the middle, at the third file that it brings to disk."""
    program = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real, calls = os.fsync, []\n"
        "def fsync(descriptor):\n"
        "    calls.append(descriptor)\n"
        f"    if len(calls) == 3: os.kill(os.getpid(), {int(number)})\n"
        "    real(descriptor)\n"
        "os.fsync = fsync\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = [sys.executable, "-c", program, str(TOOL), str(run), "--output", str(tmp_path / NAME)]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert (done.returncode, done.stdout) == (code, "")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
