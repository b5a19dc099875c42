"""What a process says of and to the program that started it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_lpa.parallel.launcher import another_port, launcher, tell_launcher
from megatron_lpa.pretrain import main
from megatron_lpa.train.stopping import stopped_line

OF = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500"},
    "deepspeed": {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"},
    "srun": {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "RANK": "1"},
    "": {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
}


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test run may have been launched itself."""
    for name in {name for of in OF.values() for name in of} | {"TORCHELASTIC_ERROR_FILE"}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torchrun", ["--master-port", "--rdzv-endpoint"]),
        ("deepspeed", ["deepspeed", "--master_port"]),
        ("srun", ["slurm/*.sh take another port", "MASTER_PORT"]),
        ("", ["MASTER_PORT"]),
    ],
)
def test_another_port_is_asked_of_what_chose_this_one(
    monkeypatch: pytest.MonkeyPatch, name: str, options: list[str]
) -> None:
    for key, value in OF[name].items():
        monkeypatch.setenv(key, value)
    assert launcher() == name
    assert [option for option in options if option not in another_port()] == []
    assert ("--" in another_port()) == (name != "srun")  # options that srun does not have


def test_a_launcher_that_srun_started_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (OF["srun"] | OF["deepspeed"]).items():
        monkeypatch.setenv(key, value)
    assert launcher() == "deepspeed"


def test_torchrun_closes_with_our_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read by torchrun's own code, which else ends with where to read about tracebacks."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["--preset", "tiny/lpa", "--train.steps", "many"]) == 78
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    failures = {0: ProcessFailure(0, 1, 78, str(file)), 1: ProcessFailure(1, 2, -15, "none")}
    closing = str(ChildFailedError("megatron_lpa.pretrain", failures)).splitlines()
    assert closing[-2].endswith(f": {said}")


def test_other_launchers_are_told_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tell_launcher("x")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    tell_launcher("x")  # the folder went with the launcher
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_launcher("x")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "x"


@pytest.mark.parametrize(
    ("step", "saved_step", "expected"),
    [
        (1200, 1200, "stopped by SIGINT after step 1,200, which is saved; the same command continues"),
        (1200, 1000, "stopped by SIGINT after step 1,200, saved at step 1,000; the same command continues"),
        (0, -1, "stopped by SIGINT after step 0, with nothing saved; the same command starts the run anew"),
    ],
)
def test_a_stop_says_how_the_run_goes_on(step: int, saved_step: int, expected: str) -> None:
    assert stopped_line(2, step, saved_step) == expected
