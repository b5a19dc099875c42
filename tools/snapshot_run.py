#!/usr/bin/env python3
"""Records in a run folder what is about to run: once the whole of it, then a line for every further start.

    python tools/snapshot_run.py --processes 16 --preset 3b/lpa --data.prefix data/pile_text_document

Takes the options of megatron_lpa.pretrain, checks them for so many processes, and prints the run folder. The
first start makes ``snapshot/`` there, which later ones never touch: the resolved configuration, the command,
the code and its commit, the packages, the job. Every start adds a line to ``logs/starts.jsonl``. Of the
environment and of what SLURM knows, only what holds no text of the user's is recorded, and known secrets are
removed from all the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_lpa import __version__
from megatron_lpa.command_line import command, run_tool
from megatron_lpa.config import RunConfig, fitted_to_world, load_config, validate_config
from megatron_lpa.config.redaction import Redaction, is_secret_name
from megatron_lpa.config.yaml_io import format_yaml
from megatron_lpa.engine.ds_config import check_zero_file
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import (
    LASTING,
    UnusableFile,
    exists,
    files_below,
    fsync_folder,
    is_file,
    new_file,
    read_bytes,
    read_json,
    tree_digest,
    write_whole,
)
from megatron_lpa.run_folder import CONFIG, LOGS, SNAPSHOT, STARTS, open_own, refuse_links

logger = logging.getLogger("megatron_lpa.tools.snapshot_run")

ARCHIVE = "code.tar.gz"
ROOT = Path(__file__).resolve().parents[1]
CODE = {
    "megatron_lpa": ("*.py", "*.yaml", "*.json"),
    "ds_configs": ("*.json",),
    "slurm": ("*.sh",),
    "tools": ("*.py",),
}
"""Folders of this project and which files in them are code."""
CODE_FILES = ("pyproject.toml", "setup.py", "constraints.txt")
ENVIRONMENT = re.compile(
    r"(NCCL|TORCH_NCCL|GLOO|OMP|DS|CUDA_VISIBLE|SLURM_NTASKS|SLURM_GPUS|MASTER)_\w+|DEVICE|CONTAINER|PYTHON"
    r"|SLURM_JOB_(ID|NODELIST|NUM_NODES|CPUS_PER_NODE|GPUS|PARTITION|QOS|ACCOUNT|USER|UID|GID|START_TIME|END_TIME)"
)
JOB = re.compile(
    r"(UserId|Priority|JobState|Requeue|RunTime|SubmitTime|AccrueTime|StartTime|SuspendTime|LastSchedEval|Partition"
    r"|ReqNodeList|NodeList|BatchHost|NumNodes|TRES|ReqTRES|AllocTRES|Socks/Node|MinCPUsNode|Features|OverSubscribe"
    r"|WorkDir|StdErr|StdIn|StdOut|Power|CpusPerTres|TresPerNode|TresPerTask|MemPerTres)="
)
"""Lines of what SLURM says of a job. Comment, Command, SubmitLine, Extra and the name are the user's own
words."""
SBATCH = re.compile(
    r"account|array|begin|chdir|clusters?|constraint|core-spec|cores-per-socket|cpu-freq|cpus-per-(gpu|task)|deadline|dependency"
    r"|distribution|error|exclude|exclusive|gpu-bind|gpus(-per-(node|socket|task))?|gres(-flags)?|hint|mem(-bind|-per-(cpu|gpu))?"
    r"|network|nice|nodelist|nodes|ntasks(-per-(core|gpu|node|socket))?|open-mode|output|oversubscribe|partition|priority|qos"
    r"|reservation|signal|sockets-per-node|switches|thread-spec|threads-per-core|time|time-min|tmp|[AaBbCcDdeFGiLMmNnopqStwx]"
)
"""Options of ``sbatch`` whose values are recorded. Of others only the name: a comment or ``--export`` may say
anything."""
CALL = re.compile(
    r"(?:\btrain_on_slurm\b|-m[ \t]+megatron_lpa\b|(?<![\w.-])(?:slurm/(?!common\b)\w+\.sh|tools/\w+\.py)(?![\w.-])).*"  # noqa: E501
)
"""Where a job script calls this project, and the rest of that command."""
COMMAND = re.compile(r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|\\.|[^;&|"'\\])+""")
COMMENT = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*'|\\.)|(?<!\S)#.*""")
MOST_SCRIPT_BYTES = 16 << 20
COMMAND_S = 30


def output_of(*command: str) -> str | None:
    """What a command prints, or ``None`` where it cannot be run or fails."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=COMMAND_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def code_files() -> Iterator[Path]:
    for folder, patterns in CODE.items():
        yield from files_below(ROOT / folder, patterns)
    yield from (ROOT / name for name in CODE_FILES if is_file(ROOT / name))


def code_digest() -> str:
    """One hash of names and contents of all the code."""
    return tree_digest(ROOT, code_files())


def version() -> dict[str, Any]:
    """Which code this is."""
    untracked = output_of("git", "ls-files", "--others", "--exclude-standard")
    return {
        "code_sha256": code_digest(),
        "commit": (output_of("git", "rev-parse", "HEAD") or "unknown").strip(),
        "described": (output_of("git", "describe", "--always", "--dirty", "--tags") or "unknown").strip(),
        "untracked": [] if untracked is None else untracked.splitlines(),
        "megatron_lpa": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def packages() -> str:
    """Names and versions as ``pip freeze`` has them, but no addresses, which may hold passwords."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def write_snapshot(folder: Path, config: RunConfig, options: Sequence[str], job_script: str | None) -> None:
    """Everything at once, or nothing; nothing where there is a snapshot already."""
    if exists(folder):
        return
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.{time.time_ns()}")
    partial.mkdir()
    try:
        _write_into(partial, config, options, job_script)
        fsync_folder(partial)
        partial.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_into(folder: Path, config: RunConfig, options: Sequence[str], job_script: str | None) -> None:
    redaction = Redaction(os.environ)
    environment = {
        name: value
        for name, value in sorted(os.environ.items())
        if ENVIRONMENT.fullmatch(name) and not is_secret_name(name)
    }
    texts = {
        CONFIG: format_yaml(redaction.tree(dataclasses.asdict(config))),
        "command.txt": shlex.join(["python", "-m", "megatron_lpa.pretrain", *redaction.words(options)])
        + "\n",
        "version.json": json.dumps(redaction.tree(version()), indent=2) + "\n",
        "changes.diff": _without_secrets_of_files(output_of("git", "diff", "HEAD") or "", redaction),
        "packages.txt": redaction.text(packages()),
        "environment.txt": "".join(f"{n}={redaction.shell(value)}\n" for n, value in environment.items()),
    }
    if job_script is not None:
        script = read_bytes(job_script, MOST_SCRIPT_BYTES).decode(errors="surrogateescape")
        texts["job_script.sh"] = described_script(script, redaction)
    if job := os.environ.get("SLURM_JOB_ID"):
        texts["job.txt"] = redaction.shell(described_job(output_of("scontrol", "show", "job", job) or ""))
    for name, text in texts.items():
        if text:
            write_whole(folder / name, text.encode(errors="surrogateescape"))
    with new_file(folder / ARCHIVE) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in code_files():
            text = read_bytes(path).decode(errors="surrogateescape")
            clean = redaction.shell(text) if path.suffix == ".sh" else redaction.text(text)
            contents = clean.encode(errors="surrogateescape")
            entry = tarfile.TarInfo(str(path.relative_to(ROOT)))
            entry.size, entry.mtime, entry.mode = len(contents), int(path.stat().st_mtime), 0o644
            archive.addfile(entry, io.BytesIO(contents))


def described_job(text: str) -> str:
    """Of what ``scontrol show job`` prints, what SLURM itself says."""
    lines = [line.strip() for line in text.splitlines()]
    found = [line.partition(" ")[0] for line in lines[:1] if line.startswith("JobId=")]
    return "".join(f"{line}\n" for line in [*found, *filter(JOB.match, lines)])


def described_script(text: str, redaction: Redaction) -> str:
    """Of a job script, its ``#SBATCH`` lines and what calls this project, without secrets; how many lines are
    left out."""
    lines = redaction.text(text).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if line.startswith("#SBATCH"):
            found += [redaction.shell(options)] if (options := _sbatch_options(line)) else []
        elif calls := [
            call[0].strip()
            for part in COMMAND.findall(COMMENT.sub(r"\1", line))
            if (call := CALL.search(part))
        ]:
            found.append("; ".join(map(redaction.shell, calls)))
    left_out = f"# {len(lines) - len(found)} of {len(lines)} lines are not recorded.\n"
    return left_out + "".join(f"{line}\n" for line in found)


def _sbatch_options(line: str) -> str | None:
    """The options of a line for ``sbatch``; ``None`` where their quotes do not match."""
    try:
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
    except ValueError:
        return None
    found, known = ["#SBATCH"], False
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            known = SBATCH.fullmatch(name[2:]) is not None
            found.append(f"{name}={shlex.quote(value) if known else '<removed>'}" if equals else name)
        elif word.startswith("-"):
            known = SBATCH.fullmatch(word[1:2]) is not None
            found.append(shlex.quote(word) if known or len(word) <= 2 else f"{word[:2]}<removed>")
        else:
            found.append(shlex.quote(word) if known else "<removed>")
    return " ".join(found)


def _without_secrets_of_files(diff: str, redaction: Redaction) -> str:
    """In code and prose, what looks like a value given to a name mostly is something else."""
    parts = re.split(r"(?m)^(?=diff --git )", diff)
    return "".join(
        redaction.text(part)
        if part.partition("\n")[0].endswith((".py", ".md", ".toml"))
        else redaction.shell(part)
        for part in parts
    )


def _add_line(path: Path, line: bytes) -> None:
    """Where the file has another name as well (``cp -al``), it is written anew: what that leads to keeps its
    contents.

    Of such a file only what lines of starts look like is taken over: it may be any of a stranger's choice.
    """
    with open_own(path, other_names=True) as log:
        there = os.fstat(log.fileno())
        if there.st_nlink < 2:
            # A full disk or a power failure can leave the last line without its end.
            torn = there.st_size and os.pread(log.fileno(), 1, there.st_size - 1) != b"\n"
            log.write(b"\n" * torn + line)
            return
    lines = (b"%s\n" % one for one in read_bytes(path).splitlines())
    write_whole(path, b"".join([*filter(_is_start, lines), line]))


def _is_start(line: bytes) -> bool:
    try:
        start = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(start, dict) and "code_sha256" in start


def note_start(run: Path, processes: int) -> list[str]:
    """Adds a line to ``logs/starts.jsonl``; what the user should know of this start.

    Raises:
        UnusableFile: that file is a link, or no regular file.
        OSError: it cannot be written.
    """
    (run / LOGS).mkdir(exist_ok=True)
    try:
        first = read_json(run / SNAPSHOT / "version.json")
        first_digest = first["code_sha256"] if isinstance(first, dict) else None
    except (OSError, UnusableFile, KeyError):
        first_digest = None
    start = {
        "time": time.time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "processes": processes,
        "code_sha256": code_digest(),
    }
    _add_line(run / LOGS / STARTS, f"{json.dumps(start)}\n".encode())
    if start["code_sha256"] == first_digest:
        return []
    return [f"the code is not that of the first start, which {run / SNAPSHOT / ARCHIVE} holds"]


def prepare(argv: Sequence[str]) -> Path:
    """Check, snapshot, note; the run folder.

    Raises:
        UserError: options that cannot run, or a run folder that cannot be written, or that a link leads out
            of.
        TryAgain: a disk that is full, or does not answer.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="of all nodes together")
    parser.add_argument("--job-script", metavar="FILE", help="a copy of it goes into the snapshot")
    own, options = parser.parse_known_args(argv)
    config, warnings = fitted_to_world(load_config(options), own.processes)
    warnings += validate_config(config, own.processes)
    check_zero_file(config, own.processes)
    assert config.logging.name is not None
    run = Path(config.logging.run_dir) / config.logging.name
    # Before anything is written: a run folder may come from a stranger.
    refuse_links(run)
    try:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(
                f"{run}: no folder, though there is something with that name; choose another logging.name"
            ) from error
        write_snapshot(run / SNAPSHOT, config, options, own.job_script)
        notes = note_start(run, own.processes)
    except OSError as error:
        kind = UserError if error.errno in LASTING else TryAgain
        raise kind(f"{run}: cannot be written: {error}; choose another logging.run_dir") from error
    for note in notes:
        logger.info(f"note: {note}")
    for warning in warnings:
        logger.warning(warning)
    return run


@command()
def main(argv: Sequence[str]) -> int:
    """0, and the run folder printed."""
    print(prepare(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
