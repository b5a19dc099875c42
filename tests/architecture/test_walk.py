"""How many files of the package whoever follows a training step, or a checkpoint, has to open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_FILES_OF_A_STEP = 20
MOST_FILES_OF_A_SAVE = 10

SMALL = """
model: {vocab_size: 97, sequence_length: 16, hidden_size: 32, num_layers: 2, ffn_hidden_size: 48}
data: {prefix: PREFIX, split: "90,5,5"}
optim: {warmup_steps: 2}
train: {steps: 11, checkpoint_interval: 5, keep_checkpoints: 1}
logging: {run_dir: RUNS, name: walked}
"""
"""``tiny/lpa`` made small: 11 steps, with checkpoints written beside step 6 and step 11, and one at the
end."""


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """Files by step and by checkpoint, of one fresh process."""
    folder = tmp_path_factory.mktemp("walk")
    for suffix in (".bin", ".idx"):
        (folder / f"text{suffix}").write_bytes((ROOT / f"tests/data/earlier_run/data{suffix}").read_bytes())
    config = folder / "small.yaml"
    config.write_text(SMALL.replace("PREFIX", str(folder / "text")).replace("RUNS", str(folder)))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        ROOT / "tests/support/walk.py",
        folder / "walk.json",
        "--preset",
        "tiny/lpa",
        "--config",
        config,
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kept = sorted(path.name for path in (folder / "walked/checkpoints").iterdir())
    assert kept == ["step_00000010", "step_00000011"]  # the one of step 5 was removed by that of step 10
    found: dict[str, list[list[str]]] = json.loads((folder / "walk.json").read_text())
    assert (len(found["steps"]), len(found["saves"])) == (11, 3)
    return found


@pytest.mark.parametrize("step", [3, 4])
def test_a_step_on_which_nothing_is_due(walk: dict[str, list[list[str]]], step: int) -> None:
    """Not one of the first, so that what is made once and kept does not count; no checkpoint is on its way
    yet."""
    files = walk["steps"][step - 1]
    assert any(name.startswith("engine/") for name in files) and any(
        name.startswith("layers/") for name in files
    )
    assert len([name for name in files if name.startswith("engine/")]) == 1, files
    assert len(files) <= MOST_FILES_OF_A_STEP, "\n".join(files)


@pytest.mark.parametrize("number", [1, 2], ids=["beside training, with an older one removed", "at once"])
def test_a_checkpoint(walk: dict[str, list[list[str]]], number: int) -> None:
    """Neither is the first; both look through the folder for what goes."""
    files = walk["saves"][number]
    assert {"checkpoint/saving.py", "checkpoint/tensor_file.py", "checkpoint/store.py"} <= {*files}
    assert len(files) <= MOST_FILES_OF_A_SAVE, "\n".join(files)
