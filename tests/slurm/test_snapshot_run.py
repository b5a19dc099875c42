"""``tools/snapshot_run.py``: what a run folder says of the code and the job that made it."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shlex
import tarfile
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

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
        names = archive.getnames()
        assert {"tools/snapshot_run.py", "slurm/common.sh", "megatron_lpa/config/redaction.py"} <= set(names)
        for name in names:  # no rule about secrets takes anything of this code for one
            packed = archive.extractfile(name)
            assert packed is not None
            assert packed.read() == (TOOL.parents[1] / name).read_bytes(), name

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
    "name",
    [
        *(
            "WANDB_API_KEY",
            "HF_TOKEN",
            "GH_PAT",
            "HF_AUTH",
            "DB_PWD",
            "my_password",
            "AUTH_HEADER",
            "SSHPASS",
        ),
        *("AZURE_STORAGE_CONN_STR", "CONNECTION_STRING", "SENTRY_DSN", "DATABASE_URL", "MYSQL_PWD", "NETRC"),
        *(
            "SLACK_WEBHOOK",
            "SLACK_WEBHOOK_URL",
            "SESSION_COOKIE",
            "API_BEARER",
            "REDIS_URL",
            "HTTPS_PROXY_URL",
        ),
    ],
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


AWKWARD = [
    "quo\"te'd secret",
    "back\\slash\\n secret",
    "dollar$`tick` secret",
    "naïve-secret",
    "a secret long enough to be folded over lines " * 4,
    "100%/sure+really=",
]


@pytest.mark.parametrize("secret", AWKWARD)
def test_a_secret_stays_out_however_it_is_quoted(
    tool: SimpleNamespace, secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", secret)
    script = tmp_path / "job.sh"
    quoted = [shlex.quote(secret), json.dumps(secret), repr(secret)]
    quoted += [yaml.safe_dump(secret, width=10**6, default_style=style).strip() for style in ("'", '"')]
    quoted += [urllib.parse.quote(secret), urllib.parse.quote_plus(secret), secret]
    script.write_text("".join(f"echo {form}\n" for form in quoted))
    # Where a YAML file would have it in quotes, and where a command would.
    assert tool.main(options("--job-script", str(script), "--logging.wandb_project", secret)) == 0
    snapshot = tmp_path / "runs" / "a run" / "snapshot"
    assert load_config(["--config", str(snapshot / "config.yaml")]).logging.wandb_project == "<MY_SECRET>"
    assert shlex.split((snapshot / "command.txt").read_text())[-1] == "<MY_SECRET>"
    lines = (snapshot / "job_script.sh").read_text().splitlines()
    assert len(lines) == len(quoted) and all("<MY_SECRET>" in line for line in lines), lines


def test_the_longest_secret_is_removed_first(tool: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("A_TOKEN", "12345678"), ("B_TOKEN", "123456789abc"), ("C_TOKEN", "x12345678y")):
        monkeypatch.setenv(name, value)
    found = tool.without_secrets("123456789abc 12345678 x12345678y 1234567")
    assert found == "<B_TOKEN> <A_TOKEN> <C_TOKEN> 1234567"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:p/a@ss@host/x", "https://<removed>@host/x"),
        ("https://user:p@ss/w@rd@host", "https://<removed>@host"),
        ("https://ghp_token@github.com/a/b.git", "https://<removed>@github.com/a/b.git"),
        ("postgres://u:p@h:5432/d?x=1", "postgres://<removed>@h:5432/d?x=1"),
        ("git+https://github.com/a/b@v1.0", "git+https://github.com/a/b@v1.0"),
        ("https://host/@scope/p", "https://host/@scope/p"),
        ("https://host:8080/x", "https://host:8080/x"),
        ("'https://u:p@h', 'a@b'", "'https://<removed>@h', 'a@b'"),
    ],
)
def test_what_a_url_has_in_front_of_its_host_is_removed(
    tool: SimpleNamespace, url: str, expected: str
) -> None:
    assert tool.without_secrets(f"x {url} y") == f"x {expected} y"


def test_the_password_of_a_url_is_removed_where_it_stands_alone(
    tool: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE", "https://user:pass/w@rd1@host/x")
    assert tool.without_secrets("curl -u user:pass/w@rd1 x") == "curl -u user:<SERVICE> x"


def test_what_scripts_and_commands_give_to_a_secret_name(tool: SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "export HF_TOKEN=abc\nDB_PASS='x y' run --api-key k1 --api-key=k2 --train.tokens=51e9\n"
        "export A_TOKEN=$B_TOKEN TOKENIZER=/t\n"
    )
    assert tool.main(options("--job-script", str(script), "--train.tokens", "51000000000")) == 0
    snapshot = tmp_path / "runs" / "a run" / "snapshot"
    assert (snapshot / "job_script.sh").read_text() == (
        "export HF_TOKEN=<removed>\nDB_PASS=<removed> run --api-key <removed> --api-key=<removed> --train.tokens=51e9\n"
        "export A_TOKEN=$B_TOKEN TOKENIZER=/t\n"
    )
    assert (snapshot / "command.txt").read_text().endswith("--train.tokens 51000000000\n")


def test_no_words_of_the_users_come_with_the_job(
    tool: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``sbatch --comment`` and the like say is for nobody but SLURM."""
    word = "hunter" + str(2)  # not as this file has it, which may be in changes.diff
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text(
        f"#!/bin/sh\ncat <<'END'\nJobId=7 JobName={word} a\n   UserId=u(1) GroupId=g(1)\n   NumNodes=2 NumCPUs=4\n"
        f"   Command=/home/u/run.sh --pw {word}\n   Comment=NumNodes={word}\n   SubmitLine=sbatch {word}\n"
        f"   AdminComment={word} x\n   Extra={word}\n   WorkDir=/home/u\nEND\n"
    )
    (commands / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("COMMENT", "NAME", "EXTRA", "RESERVATION", "ADMIN_COMMENT"):
        monkeypatch.setenv(f"SLURM_JOB_{name}", word)
    assert tool.main(options()) == 0
    snapshot = tmp_path / "runs" / "a run" / "snapshot"
    assert (snapshot / "job.txt").read_text() == (
        "JobId=7\nUserId=u(1) GroupId=g(1)\nNumNodes=2 NumCPUs=4\nWorkDir=/home/u\n"
    )
    assert "SLURM_JOB_ID=7" in (snapshot / "environment.txt").read_text()
    for path in snapshot.iterdir():
        assert word.encode() not in path.read_bytes(), path


def test_the_snapshot_has_the_umasks_permissions(tool: SimpleNamespace, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert tool.main(options()) == 0
    finally:
        os.umask(before)
    snapshot = tmp_path / "runs" / "a run" / "snapshot"
    assert {path.stat().st_mode & 0o777 for path in snapshot.iterdir()} == {0o600}


def test_a_secret_that_looks_like_a_path_too_long_for_one(
    tool: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "/" + "x" * 5000)
    assert tool.without_secrets("/" + "x" * 5000) == "<SOME_KEY>"


def test_a_damaged_record_of_the_first_start_is_told_of_and_stops_nothing(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(options()) == 0
    version = tmp_path / "runs" / "a run" / "snapshot" / "version.json"
    for content in ("{", "[" * 100_000, "[]", "{}"):
        version.write_text(content)
        capsys.readouterr()
        assert tool.main(options()) == 0
        assert "note: the code is not that of the first start" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EACCES, 78)])
def test_a_disk_that_does_not_take_the_snapshot(
    tool: SimpleNamespace, number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """1 lets a requeued job ask again; 78 means that somebody has to do something."""

    def fails(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    assert tool.main(options()) == code
    assert f"cannot be written: [Errno {number}]" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs" / "a run").iterdir()] == []


def test_options_that_cannot_run_leave_nothing(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(options("--train.global_batch_size", "7")) == 78
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: train.global_batch_size")
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_cannot_be_made(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert tool.main(options()) == 78
    assert "cannot be written" in capsys.readouterr().err
