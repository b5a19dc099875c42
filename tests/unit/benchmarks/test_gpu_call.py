"""The one call: what it refuses, and that nothing it started outlives it. The suite itself is played here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_call
from benchmarks.commands import ROOT
from megatron_lpa.errors import UserError

PLAYED_SUITE = """
import pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
# In a session of its own, as the processes that measure steps are.
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
(folder / "child").write_text(str(child.pid))
(folder / "gpu_suite.json").write_text("{}")
(folder / "gpu_suite.json.partial").write_text("half")
(folder / "trace.json.gz").write_bytes(bytes(17 * 2**20))
print("measured", flush=True)
exec(sys.argv[2])
"""

CALL = """
import argparse, os, pathlib, sys, time
from benchmarks import gpu_call
gpu_call.GRACE_S = 1.0
folder = pathlib.Path(sys.argv[1])
arguments = argparse.Namespace(output=folder, suite=[], earlier=None, dry_run=True)
suite = gpu_call.SuiteProcess(arguments, {}, dict(os.environ), time.monotonic() + float(sys.argv[3]))
suite.command = [sys.executable, "-c", PLAYED, str(folder), sys.argv[2]]
sys.exit(suite.run())
""".replace("PLAYED", repr(PLAYED_SUITE))


def called(folder: Path, act: str, limit_s: float = 60.0) -> subprocess.Popen[str]:
    """A call in a process of its own, which ends all its descendants."""
    command = [sys.executable, "-c", CALL, str(folder), act, str(limit_s)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert path.exists()


def assert_gone(process_id: int) -> None:
    stat = Path(f"/proc/{process_id}/stat")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process_id} is still there")


@pytest.mark.parametrize(
    ("act", "limit_s", "code", "said"),
    [
        ("sys.exit(0)", 60.0, 0, ""),
        ("sys.exit('failed: gate')", 60.0, 1, ""),
        ("import os; os.kill(os.getpid(), 9)", 60.0, 1, "ended by SIGKILL; --continue goes on"),
        ("time.sleep(300)", 0.0, 1, "ended by SIGTERM"),
        ("signal.signal(15, signal.SIG_IGN); time.sleep(300)", 0.0, 1, "ended by SIGKILL"),
    ],
    ids=["done", "failed", "killed", "over the limit", "deaf"],
)
def test_results_stay_and_processes_end(
    act: str, limit_s: float, code: int, said: str, tmp_path: Path
) -> None:
    call = called(tmp_path, act, limit_s)
    out, err = call.communicate(timeout=60)
    assert call.returncode == code and said in err, err
    assert_gone(int((tmp_path / "child").read_text()))
    assert "measured" in out and "trace.json.gz: left out, 17 MiB" in out
    assert {path.name for path in tmp_path.iterdir()} == {"child", "gpu_suite.json", "gpu_suite.log"}


def test_sigterm_ends_everything(tmp_path: Path) -> None:
    call = called(tmp_path, "time.sleep(300)")
    wait_for(tmp_path / "trace.json.gz")
    call.send_signal(signal.SIGTERM)
    call.communicate(timeout=60)
    assert call.returncode == 143
    assert_gone(int((tmp_path / "child").read_text()))


def test_the_suite_is_told_when_the_call_is_killed(tmp_path: Path) -> None:
    act = "(folder / 'suite').write_text(str(__import__('os').getpid())); time.sleep(300)"
    call = called(tmp_path, act)
    wait_for(tmp_path / "suite")
    time.sleep(0.1)
    call.kill()
    call.communicate(timeout=60)
    assert_gone(int((tmp_path / "suite").read_text()))
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # the real suite does this itself


def test_without_a_compiler_steps_are_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = {"capability": [9, 0], "name": "NVIDIA H200", "compiler": "RuntimeError: Python.h"}
    monkeypatch.setattr(
        gpu_call.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 0, json.dumps(gpu), "")
    )
    assert gpu_call.check_gpu() == gpu and "Python.h" in capsys.readouterr().err
    parser = gpu_call.argparse.ArgumentParser()
    gpu_call.add_arguments(parser)
    arguments = parser.parse_args(["--wheels", "w", "--output", str(tmp_path)])
    assert "kernels.elementwise=eager" in gpu_call.SuiteProcess(arguments, gpu, {}, 0.0).command


def test_wheels_are_unpacked_and_a_deepspeed_that_fails_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel, broken = tmp_path / "deepspeed-0-py3-none-any.whl", tmp_path / "broken.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("deepspeed/__init__.py", "raise ImportError('too old a friend')")
    environment = gpu_call.prepared([wheel], tmp_path)
    assert environment["PYTHONPATH"].startswith(str(tmp_path / "site"))
    out, err = capsys.readouterr()
    assert wheel.name in out and "DeepSpeed cannot be imported (ImportError: too old a friend)" in err
    broken.write_text("no archive")
    with pytest.raises(UserError, match=r"broken\.whl: cannot be unpacked"):
        gpu_call.prepared([broken], tmp_path)


def test_an_earlier_result_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "gpu_suite.json").write_text("{}")
    with pytest.raises(UserError, match="holds a result already; go on with it"):
        gpu_call.check_output(tmp_path, goes_on=False)
    gpu_call.check_output(tmp_path, goes_on=True)


def test_a_refused_continuation_leaves_the_earlier_log_and_an_accepted_one_adds_to_it(tmp_path: Path) -> None:
    log = tmp_path / "gpu_suite.log"
    log.write_text("the first call\n")
    script = CALL.replace("earlier=None", "earlier=folder")
    for act, expected in (
        ("(folder / 'gpu_suite.json').unlink(); print('error: no way'); sys.exit(2)", "the first call\n"),
        ("sys.exit(0)", "the first call\nmeasured\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), act, "60"], cwd=ROOT, capture_output=True, text=True
        )
        assert log.read_text() == expected and "the first call" not in done.stdout


def test_a_refusal_of_the_suite_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    act = (
        "[p.unlink() for p in folder.iterdir() if p.name != 'gpu_suite.log']; print('error: no way'); "
        "sys.exit(2)"
    )
    call = called(tmp_path, act)
    _, err = call.communicate(timeout=60)
    assert "UserError: no way" in err.splitlines()[-1] and list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_call, "prepared", lambda *_: pytest.fail("nothing is installed"))
    (tmp_path / "file").touch()
    words = ["--wheels", str(tmp_path), "--output", str(tmp_path / "file" / "out"), "--dry-run"]
    assert gpu_call.main(words) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --output") and "cannot be written" in line


@pytest.mark.parametrize(
    ("probed", "code", "message"),
    [
        ({}, 0, "PyTorch finds no GPU"),
        (
            {"capability": [10, 0], "name": "NVIDIA B200"},
            0,
            r"NVIDIA B200 has compute capability 10.0, .* 8.0 and 9.0",
        ),
        ({}, 1, "PyTorch cannot look for a GPU: ImportError: libcuda"),
    ],
)
def test_without_a_gpu_that_kernels_are_for(
    probed: dict[str, object], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, code, json.dumps(probed) + "\n", "x\nImportError: libcuda\n"
        )

    monkeypatch.setattr(gpu_call.subprocess, "run", run)
    with pytest.raises(UserError, match=message):
        gpu_call.check_gpu()


def test_a_gpu_that_kernels_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table goes where models on this machine look, and the earlier result is passed on."""
    gpu = {"capability": [9, 0], "name": "NVIDIA H200", "compiler": ""}

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, f"a warning\n{json.dumps(gpu)}\n", "")

    monkeypatch.setattr(gpu_call.subprocess, "run", run)
    assert gpu_call.check_gpu() == gpu
    words = ["--wheels", "w", "--output", str(tmp_path), "--continue", "old.json", "--", "--parts", "gate"]
    arguments = gpu_call.argparse.ArgumentParser()
    gpu_call.add_arguments(arguments)
    command = gpu_call.SuiteProcess(arguments.parse_args(words), gpu, {}, time.monotonic() + 120).command
    assert command[-1].endswith("megatron_lpa/ops/tuning/sm_90.json") and "--dry-run" not in command
    assert 119 < float(command[command.index("--until") + 1]) - time.monotonic() < 121
    assert "kernels.elementwise=eager" not in command
    assert command[command.index("--continue") + 1] == str(Path("old.json").resolve())
    assert command[command.index("--parts") + 1] == "gate"
