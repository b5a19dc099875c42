"""The batch scripts have none of the traps that shellcheck knows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(REPOSITORY.glob("slurm/*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not found; as root: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", "--norc", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
