"""docs/adding_a_structure.md, followed to the letter: the structure trains, saves, resumes anywhere and
converts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.page_edits import PAGE, ROOT, follow


def test_the_page_s_structure_does_all_that_a_shipped_one_does(tmp_path: Path) -> None:
    follow(PAGE, tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "page_structure_run.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}:{ROOT}"},
        cwd=tmp_path, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
