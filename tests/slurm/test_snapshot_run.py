"""``tools/snapshot_run.py``: what a run folder says of the code and the job that made it."""

from __future__ import annotations

import json
import runpy
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lpa.config import load_config

TOOL = Path(__file__).resolve().parents[2] / "tools" / "snapshot_run.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return SimpleNamespace(**runpy.run_path(str(TOOL)))


def options(*more: str) -> list[str]:
    return [
        "--processes",
        "2",
        "--preset",
        "tiny/lpa",
        "--data.prefix",
        "data",
        "--logging.name",
        "a run",
        *more,
    ]


def test_the_first_start_records_everything_and_later_ones_leave_it_alone(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n")
    assert tool.main(options("--job-script", str(script))) == 0
    assert capsys.readouterr().out == "runs/a run\n"
    snapshot = tmp_path / "runs" / "a run" / "snapshot"
    names = {path.name for path in snapshot.iterdir()}
    assert {
        "command.txt",
        "config.yaml",
        "version.json",
        "packages.txt",
        "code.tar.gz",
        "job_script.sh",
    } <= names
    assert load_config(["--config", str(snapshot / "config.yaml")]).train.steps == 250
    assert json.loads((snapshot / "version.json").read_text())["code_sha256"] == tool.code_digest()
    with tarfile.open(snapshot / "code.tar.gz") as archive:
        packed = archive.extractfile("tools/snapshot_run.py")
        assert packed is not None
        assert packed.read() == TOOL.read_bytes()

    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in snapshot.iterdir()}
    assert tool.main(options("--train.steps", "7")) == 0
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in snapshot.iterdir()} == before
    starts = (snapshot.parent / "logs" / "starts.jsonl").read_text().splitlines()
    assert len(starts) == 2
    assert sorted(path.name for path in snapshot.parent.iterdir()) == ["logs", "snapshot"]


def test_other_code_than_at_the_first_start_is_told_of(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(options()) == 0
    version = tmp_path / "runs" / "a run" / "snapshot" / "version.json"
    version.write_text(json.dumps({"code_sha256": "another"}))
    capsys.readouterr()
    assert tool.main(options()) == 0
    assert "note: the code is not that of the first start" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "GH_PAT", "HF_AUTH", "DB_PWD", "my_password", "AUTH_HEADER"]
)
def test_what_is_called_like_a_secret(
    tool: SimpleNamespace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "/9j2kd83hs")
    assert tool.without_secrets("a /9j2kd83hs b") == f"a <{name}> b"


@pytest.mark.parametrize("name", ["TOKENIZER", "PATH_TO_DATA", "AUTHOR", "SSH_KEY_FILE", "PWD"])
def test_a_path_is_no_secret(
    tool: SimpleNamespace, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a snapshot's config would name no data that exists."""
    monkeypatch.setenv(name, str(tmp_path))
    assert tool.without_secrets(f"prefix: {tmp_path}") == f"prefix: {tmp_path}"


def test_secrets_stay_out(tool: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_SECRET", "an-nccl-secret")
    monkeypatch.setenv("HOME_ADDRESS", "elsewhere")
    script = tmp_path / "job.sh"
    script.write_text("export HF_TOKEN=hf_0123456789\npip install https://me:pass@example.org/simple\n")
    assert tool.main(options("--job-script", str(script), "--logging.wandb_project", "hf_0123456789")) == 0
    snapshot = tmp_path / "runs" / "a run" / "snapshot"
    assert (snapshot / "job_script.sh").read_text() == (
        "export HF_TOKEN=<HF_TOKEN>\npip install https://<removed>@example.org/simple\n"
    )
    environment = (snapshot / "environment.txt").read_text()
    assert "NCCL_DEBUG=INFO" in environment
    for path in snapshot.iterdir():
        for secret in (b"hf_0123456789", b"an-nccl-secret", b"elsewhere"):
            assert secret not in path.read_bytes(), path


def test_options_that_cannot_run_leave_nothing(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(options("--train.global_batch_size", "7")) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: train.global_batch_size")
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_cannot_be_made(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert tool.main(options()) == 1
    assert "cannot be written" in capsys.readouterr().err
