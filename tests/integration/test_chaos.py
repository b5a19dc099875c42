"""The short plan of faults, as a user starts it: everything that is promised holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads and signals processes as Linux does")
def test_a_run_survives_every_kind_of_fault(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [
        sys.executable, str(ROOT / "tools/chaos.py"), "--plan", "short", "--output", str(output), "--folder",
        str(tmp_path / "runs"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["violations"] == 0 and result["faults"] == 23
    assert {
        "kill-one", "kill-random", "kill-in-save", "signal", "signal-twice", "pause", "stop-for-ever",
        "damage",
        "disk-full", "read-error", "nan", "clock", "rank-mismatch", "open-error", "open-error-lasting",
        "link", "malformed",
        "pipe", "hang-start", "stop-between-bad",
    } == set(result["kinds"])  # fmt: skip
    assert not list((tmp_path / "runs").iterdir())  # nothing is left where nothing went wrong
