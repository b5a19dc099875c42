"""How the scripts take what ``snapshot_run.py`` ends with; needs no SLURM."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

COMMON = Path(__file__).resolve().parents[2] / "slurm" / "common.sh"

SCRIPT = """
set -euo pipefail
source "$1"
repository=/nowhere processes=2 restarts="$2" python=("$3")
find_run --preset 3b/lpa
echo "run=$run"
"""


def find_run(folder: Path, restarts: int, *codes: int) -> tuple[int, str, int]:
    """Exit code and output of a start at which the tool ends with ``codes``, attempt by attempt; and its
    attempts."""
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    tool = folder / "python"
    tool.write_text(
        f'#!/bin/bash\ncd {folder}\necho x >>attempts\ncode="$(sed -n "$(wc -l <attempts)p" codes)"\n'
        '[[ $code == 0 ]] && echo "runs/a run"\nexit "$code"\n'
    )
    tool.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", SCRIPT, "script", str(COMMON), str(restarts), str(tool)],
        env={"PATH": "/usr/bin:/bin", "HEALTH_PAUSE_S": "0", "SLURM_JOB_ID": "7"}, capture_output=True,
        text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, len((folder / "attempts").read_text().splitlines())


@pytest.mark.parametrize(
    ("restarts", "codes", "expected"),
    [
        (0, [0], (0, "run=runs/a run\n", 1)),
        (0, [78], (2, "", 1)),  # wrong options: somebody is there to mend them
        (0, [1], (1, "", 1)),
        (0, [2], (2, "", 1)),
        (0, [127], (2, "", 1)),  # no Python
        (3, [78], (2, "", 1)),
        (3, [1, 1, 0], (0, "run=runs/a run\n", 3)),  # a disk that answers again does not end a requeued job
        (3, [1, 1, 1], (1, "", 3)),
        (3, [1, 78], (2, "", 2)),
    ],
)
def test_a_disk_that_does_not_answer_is_no_wrong_option(
    tmp_path: Path, restarts: int, codes: list[int], expected: tuple[int, str, int]
) -> None:
    assert find_run(tmp_path, restarts, *codes) == expected
