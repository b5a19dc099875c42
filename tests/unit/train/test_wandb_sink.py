"""What Weights & Biases is told of a run: its figures and its configuration, and nothing of the
environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("wandb")

PROGRAM = """
import sys
from pathlib import Path
from types import SimpleNamespace
from megatron_lpa.config import load_config
from megatron_lpa.train.callbacks.weights_and_biases import WandB

folder = Path(sys.argv[1])
config = load_config(["--preset", "tiny/lpa", "--data.prefix", "/data/open-" + "secret-of-prefix"])
sink = WandB("offline")
sink.open(SimpleNamespace(folder=folder, config=config))
print("printed-" + "while-it-ran")
print("printed-" + "while-it-ran", file=sys.stderr)
sink.write({"kind": "train", "step": 1, "time": 0.0, "loss": 2.5})
sink.close()
"""

SECRETS = {
    "SLURM_JOB_COMMENT": "comment-of-the-job",
    "SLURM_JOB_NAME": "name-of-the-job",
    "SLURM_EXPORT_ENV": "exported-by-the-job",
    "MY_TOKEN": "secret-of-prefix",
}


def test_nothing_of_the_environment_the_command_or_the_repository_is_recorded(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for command in (
        ["init", "-q"],
        ["remote", "add", "origin", "https://user:pass-of-the-remote@example.org/x.git"],
        ["-c", "user.name=a", "-c", "user.email=b@c", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], cwd=repository, check=True)
    run = tmp_path / "run"
    run.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run), "--api-key=given-to-the-command"],
        cwd=repository, env={**environment, **SECRETS, "SLURM_JOB_ID": "7"}, check=True, capture_output=True,
        timeout=120,
    )  # fmt: skip
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    (record,) = [path for path in files if path.suffix == ".wandb"]
    content = record.read_bytes()
    assert b"hidden_size" in content and b"train/loss" in content and b"<MY_TOKEN>" in content
    for secret in (*SECRETS.values(), "given-to-the-command", "pass-of-the-remote", "printed-while-it-ran"):
        holders = [path for path in files if secret.encode() in path.read_bytes()]
        assert holders == [], secret
    assert {path.name for path in files} & {"output.log", "requirements.txt"} == set()
