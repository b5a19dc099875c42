"""``tools/snapshot_run.py``: what a run folder says of the code and the job that made it."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import shlex
import shutil
import tarfile
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.hiccups import first_looks_fail

from megatron_lpa.config import load_config
from megatron_lpa.config.redaction import Redaction
from megatron_lpa.run_folder import refuse_links

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


def recorded(*lines: str) -> str:
    """What the job script of a first start leaves in the snapshot, without the line that counts what is left out."""  # noqa: E501
    Path("job.sh").write_text("".join(f"{line}\n" for line in lines))
    tool = SimpleNamespace(**runpy.run_path(str(TOOL)))
    assert tool.main(options("--job-script", "job.sh")) == 0
    left_out, _, kept = Path("runs/a run/snapshot/job_script.sh").read_text().partition("\n")
    count = sum(not line.endswith("\\") for line in lines)
    assert left_out == f"# {count - len(kept.splitlines())} of {count} lines are not recorded."
    return kept


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


def test_a_disk_that_does_not_answer_at_once_leaves_no_code_out(
    tool: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(tool.code_files())
    assert TOOL in whole and TOOL.parents[1] / "pyproject.toml" in whole
    with monkeypatch.context() as patched:
        failed = first_looks_fail(patched, tool.ROOT, errno.ESTALE, ("scandir", "stat", "lstat"))
        assert list(tool.code_files()) == whole
    assert str(tool.ROOT / "megatron_lpa") in failed


def test_a_torn_line_of_an_earlier_start_takes_no_other_with_it(
    tool: SimpleNamespace, tmp_path: Path
) -> None:
    assert tool.main(options()) == tool.main(options()) == 0
    starts = tmp_path / "runs" / "a run" / "logs" / "starts.jsonl"
    first, second = starts.read_text().splitlines(keepends=True)
    starts.write_text(first + second[:40])
    assert tool.main(options()) == 0
    whole, torn, added = starts.read_text().splitlines(keepends=True)
    assert (whole, torn) == (first, second[:40] + "\n")
    assert json.loads(added)["code_sha256"] == json.loads(first)["code_sha256"]


def test_other_code_than_at_the_first_start_is_told_of(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(options()) == 0
    version = tmp_path / "runs" / "a run" / "snapshot" / "version.json"
    version.write_text(json.dumps({"code_sha256": "another"}))
    capsys.readouterr()
    assert tool.main(options()) == 0
    assert "note: the code is not that of the first start" in capsys.readouterr().err


def test_secrets_stay_out(tool: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_SECRET", "an-nccl-secret")
    monkeypatch.setenv("HOME_ADDRESS", "elsewhere")
    script = tmp_path / "job.sh"
    script.write_text(
        "export HF_TOKEN=hf_0123456789\ntrain_on_slurm hf_0123456789 https://me:pass@example.org/simple\n"
    )
    assert tool.main(options("--job-script", str(script), "--logging.wandb_project", "hf_0123456789")) == 0
    snapshot = tmp_path / "runs" / "a run" / "snapshot"
    assert (snapshot / "job_script.sh").read_text() == (
        "# 1 of 2 lines are not recorded.\ntrain_on_slurm <HF_TOKEN> https://<removed>@example.org/simple\n"
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
    percent = [
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
    ]
    lower = [re.sub("%..", lambda escape: escape[0].lower(), form) for form in percent]
    quoted += [*percent, *lower, secret]
    script.write_text("".join(f"train_on_slurm {form}\n" for form in quoted))
    # Where a YAML file would have it in quotes, and where a command would.
    assert tool.main(options("--job-script", str(script), "--logging.wandb_project", secret)) == 0
    snapshot = tmp_path / "runs" / "a run" / "snapshot"
    assert load_config(["--config", str(snapshot / "config.yaml")]).logging.wandb_project == "<MY_SECRET>"
    assert shlex.split((snapshot / "command.txt").read_text())[-1] == "<MY_SECRET>"
    lines = (snapshot / "job_script.sh").read_text().splitlines()[1:]
    assert len(lines) == len(quoted) and all("<MY_SECRET>" in line for line in lines), lines


PLANTED = "sword-fish9"
SECRET_LINES = [
    *(f"export {name}={PLANTED}" for name in (
        "HF_TOKEN", "DB_PW", "DB_CREDS", "AWS_CRED", "DBPASS", "SMTPPASS", "LDAP_BINDPW", "GH_PASSWRD", "CURL_USERPWD", "db-pass",  # noqa: E501
    )),
    f"HF_TOKEN=${{HF_TOKEN:-{PLANTED}}}", f': "${{HF_TOKEN:={PLANTED}}}"', f"HF_TOKEN=$'{PLANTED} b'", f"HF_TOKEN=a\\ {PLANTED}",  # noqa: E501
    f'HF_TOKEN="$(echo {PLANTED})"', f"HF_TOKEN=$(echo a {PLANTED})", f"HF_TOKEN=`echo {PLANTED}`", f'HF_TOKEN="a {PLANTED}',  # noqa: E501
    f"HF_TOKEN+={PLANTED}", f"TOKENS=(a {PLANTED})", f"setenv HF_TOKEN {PLANTED}", f"set -gx HF_TOKEN {PLANTED}",  # noqa: E501
    f"HF_TOKEN=\\\n{PLANTED}", f"run --password \\\n  {PLANTED}", f"run --api-key={PLANTED}", f"srun --export=ALL,HF_TOKEN={PLANTED} x",  # noqa: E501
    f"A=$(HF_TOKEN={PLANTED} run)", f"read -r HF_TOKEN <<< {PLANTED}", f"run <<< 'password: {PLANTED}'", f"password: a {PLANTED}",  # noqa: E501
    f"password: |\n  {PLANTED}\n", f'{{"api_key": "{PLANTED}", "b": 1}}', f"{{'api_key' : '{PLANTED}'}}",
    f'curl -H "Authorization: Bearer {PLANTED}"', f"curl -H 'authorization: Digest a, {PLANTED}'", f'curl -H "X-Api-Key: {PLANTED}"',  # noqa: E501
    f"curl -u me:{PLANTED} x", f"curl -ume:{PLANTED} x", f"curl --user=me:{PLANTED} x", f"sshpass -p {PLANTED} ssh x",  # noqa: E501
    f"sshpass -p'{PLANTED}' ssh x", f"wandb login {PLANTED}", f"wandb login --relogin {PLANTED}", f"docker login -u me -p {PLANTED} x",  # noqa: E501
    f"machine h login me password {PLANTED}", f"curl https://h/x?a=1&sig={PLANTED}&b=2",
]  # fmt: skip


@pytest.mark.parametrize("line", SECRET_LINES)
def test_what_is_given_to_a_secret_name_stays_out_of_scripts_and_their_changes(
    tool: SimpleNamespace, line: str
) -> None:
    found = Redaction({}).shell(line)
    assert PLANTED not in found and re.search("<removed>", found)
    diff = "".join(f"diff --git a/{name} b/{name}\n+{line}\n" for name in ("a.sh", ".env", "a.yaml"))
    assert PLANTED not in tool._without_secrets_of_files(diff, Redaction({}))


def test_of_a_job_script_little_is_recorded(tool: SimpleNamespace) -> None:
    assert recorded(
        "#!/bin/bash",
        "#SBATCH --nodes=2 -n 4 --comment 'x swordfish' --export=ALL,DBX=swordfish -J swordfish  # swordfish",
        "#SBATCH --gres=gpu:8 -Jswordfish",
        "#SBATCH --comment='swordfish",
        "DBX=swordfish curl swordfish; X=swordfish train_on_slurm \"$repository\" --a 'b;c' \\",
        "    --api-key swordfish # swordfish",
        "# train_on_slurm swordfish",
        "cat <<END",
        "swordfish",
        "END",
        "echo swordfish | srun --export=ALL,Q=swordfish python -m megatron_lpa.pretrain --preset tiny/lpa && echo swordfish",  # noqa: E501
    ) == (
        "#SBATCH --nodes=2 -n 4 --comment <removed> --export=<removed> -J <removed>\n"
        "#SBATCH --gres=gpu:8 -J<removed>\n"
        "train_on_slurm \"$repository\" --a 'b;c'      --api-key <removed>\n"
        "-m megatron_lpa.pretrain --preset tiny/lpa\n"
    )


def outside(tmp_path: Path) -> Path:
    """Somebody else's folder, with a file."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("theirs\n")
    return folder


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "fifo", "folder"])
@pytest.mark.parametrize("name", ["logs", "logs/starts.jsonl", "snapshot", "checkpoints"])
def test_nothing_is_written_where_a_strangers_run_folder_leads(
    tool: SimpleNamespace, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = outside(tmp_path)
    path = tmp_path / "runs" / "a run" / name
    path.parent.mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "hard link":
        os.link(theirs / "file", path)
    else:
        path.symlink_to(theirs / "nothing" if kind == "dangling" else theirs)
    before = sorted(tmp_path.rglob("*"))
    code = tool.main(options())
    printed = capsys.readouterr()
    assert [path.name for path in theirs.iterdir()] == ["file"]
    assert (theirs / "file").read_text() == "theirs\n"
    belongs_there = (kind == "folder") == (name != "logs/starts.jsonl") and kind in ("folder", "hard link")
    assert code == (0 if belongs_there else 78)
    if belongs_there:
        (line,) = (tmp_path / "runs" / "a run" / "logs" / "starts.jsonl").read_text().splitlines()
        assert json.loads(line)["processes"] == 2, "nothing of theirs is taken over"
    else:
        assert printed.err.count("\n") == 1 and str(path.relative_to(tmp_path)) in printed.err, printed.err
        assert name == "logs/starts.jsonl" or sorted(tmp_path.rglob("*")) == before


def test_a_copy_made_of_hard_links_keeps_its_contents_and_stops_no_start(
    tool: SimpleNamespace, tmp_path: Path
) -> None:
    """As ``cp -al`` makes them."""
    log = tmp_path / "runs" / "a run" / "logs" / "starts.jsonl"
    for number in (1, 2, 3):
        assert tool.main(options()) == 0
        assert log.stat().st_nlink == 1
        os.link(log, tmp_path / f"copy{number}")
    first = (tmp_path / "copy1").read_text()
    assert (tmp_path / "copy2").read_text().startswith(first) and log.read_text().startswith(first)
    assert [len((tmp_path / f"copy{number}").read_text().splitlines()) for number in (1, 2, 3)] == [1, 2, 3]


def test_what_a_killed_start_leaves_stops_no_later_one(
    tool: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing
        with pytest.raises(SystemExit):
            tool.main(options())
    run = tmp_path / "runs" / "a run"
    assert len(list(run.iterdir())) == 1
    refuse_links(run)
    assert tool.main(options()) == 0
    assert (run / "snapshot" / "config.yaml").exists()


def test_a_file_in_place_of_the_run_folder(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a run").touch()
    assert tool.main(options()) == 78
    assert "error: runs/a run: a regular file, where the run folder belongs" in capsys.readouterr().err


def test_no_words_of_the_users_come_with_the_job(
    tool: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``sbatch --comment`` and the like say is for nobody but SLURM."""
    word = "hunter" + str(2)  # not as this file has it, which may be in changes.diff
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text(
        f"#!/bin/sh\ncat <<'END'\nJobId=7 JobName={word} a\n   UserId=u(1) GroupId=g(1)\n   NumNodes=2 NumCPUs=4\n"  # noqa: E501
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
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 1, "offload_optimizer": true}}')
    for key, value in (("train.global_batch_size", "7"), ("train.deepspeed_config", "own.json")):
        assert tool.main(options(f"--{key}", value)) == 78
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(("error: train.global", "error: own.json: zero_optimization.offload_"))
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_cannot_be_made(
    tool: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert tool.main(options()) == 78
    assert "error: runs: a regular file, where a folder for runs/a run belongs" in capsys.readouterr().err
