"""Parts of ``slurm/common.sh`` that need no SLURM: the port, what a job says last, how a stopped one ends."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = REPOSITORY / "slurm" / "common.sh"


def bash(folder: Path, script: str, state: str = "RUNNING", **environment: str) -> tuple[int, str]:
    """Exit code and output of lines after ``common.sh``; SLURM's commands write down how they are called."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("squeue", "scancel", "scontrol"):
        (programs / name).write_text(f'#!/bin/bash\necho {name} "$*" >>{folder}/called\necho {state}\n')
        (programs / name).chmod(0o755)
    before = f'set -euo pipefail; source "$1"; run=run logs=run/logs/7.0 python=("{sys.executable}") asked_by=TERM; '  # noqa: E501
    done = subprocess.run(
        ["bash", "-c", before + script, "script", str(COMMON)],
        cwd=folder, env={"PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY),
        "SLURM_JOB_ID": "7", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A run folder with a checkpoint and the logs of a start."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000012"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    (tmp_path / "run" / "logs" / "7.0").mkdir(parents=True)
    return tmp_path


def test_each_start_meets_at_another_port(site: Path) -> None:
    code, said = bash(site, "for i in 1 2 3; do unset MASTER_PORT; choose_port; printenv MASTER_PORT; done")
    ports = [int(line) for line in said.split()]
    assert code == 0 and len(set(ports)) > 1 and all(10_000 <= port < 30_000 for port in ports)


def test_the_users_port_is_taken_while_it_is_free(site: Path) -> None:
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as server:  # taken at one address is taken: rank 0 may listen at all
        port = str(server.getsockname()[1])
        code, said = bash(site, "choose_port; printenv MASTER_PORT", MASTER_PORT=port)
        note, chosen = said.splitlines()
        assert (
            code == 0
            and chosen != port
            and re.match(f"note: port {port} cannot be used on .*: Address already", note)
        )
    assert bash(site, "choose_port; printenv MASTER_PORT", MASTER_PORT=port) == (0, f"{port}\n")


@pytest.mark.parametrize("port", ["x", "0", "65536", "9" * 5000, "12 13", "-1"])
def test_what_is_no_port_ends_the_job(site: Path, port: str) -> None:
    code, said = bash(site, "choose_port", MASTER_PORT=port)
    first, *_, last = said.splitlines()
    assert (
        code == 2
        and first.startswith("error: MASTER_PORT is ")
        and last.startswith("error: there is no port")
    )


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({}, ""),
        ({"0": "step 1\n", "1": ""}, ""),
        ({"0": "step 1\nerror: lr is bad\nerror: later\nexit code 78: x\n"}, ". Training said: lr is bad\n"),
        (
            {"0": "error: rank 0 lost its connection to another process, which\n",
            "1": "error: no room on disk\n"},
            ". Training said: no room on disk\n",
        ),
        ({"0": "error: rank 0 lost its connection to another process, which\n"},
         ". Training said: rank 0 lost its connection to another process, which\n"),
        ({"0": "error: " + "x" * 5000}, f". Training said: {'x' * 1000}\n"),
    ],
)  # fmt: skip
def test_the_cause_is_what_a_process_said_first(site: Path, logs: dict[str, str], expected: str) -> None:
    for rank, text in logs.items():
        (site / "run" / "logs" / "7.0" / f"rank_000{rank}.log").write_text(text)
    assert bash(site, "cause") == (0, expected)


@pytest.mark.parametrize(
    ("state", "cancels"), [("RUNNING", True), ("COMPLETING", False), ("PENDING", False), ("", False)]
)
def test_a_stopped_job_is_cancelled_unless_slurm_has_ended_it_otherwise(
    site: Path, state: str, cancels: bool
) -> None:
    """SLURM also stops a job that it requeues, and would not start it again once it is cancelled."""
    code, said = bash(site, "status=143; end_stopped", state)
    assert code == 143
    assert "stopped at the checkpoint of step 12; submit the same line again to continue" in said
    assert ("scancel 7" in (site / "called").read_text().splitlines()) == cancels


def test_a_stop_that_loses_steps_is_a_failure(site: Path) -> None:
    (site / "run" / "logs" / "7.0" / "rank_0000.log").write_text(
        "error: the checkpoint could not be written\n"
    )
    code, said = bash(site, "first_log=none; status=1; end_stopped")
    assert code == 143 and not (site / "called").exists()
    assert said.splitlines()[-1] == (
        "error: stopped, but not in order: what came after step 12 is lost. Training said: the checkpoint "
        "could not be written"
    )
