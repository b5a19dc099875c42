"""Whole runs on a disk whose files do not open: at the first attempt, or ever. The system itself refuses."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launching import SMALL, TIMEOUT_S, records
from support.token_datasets import TOKENIZER, write_dataset

VOCAB_SIZE = 97  # of small.yaml


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and its manifest."""
    folder = tmp_path_factory.mktemp("hiccups")
    documents = [[(3 * number + place) % VOCAB_SIZE for place in range(40)] for number in range(60)]
    tokenizer = replace(TOKENIZER, vocab_size=VOCAB_SIZE, eod_id=None)
    write_dataset(
        folder / "data",
        documents,
        change=lambda manifest: replace(manifest, tokenizer=tokenizer, append_eod=False),
    )
    return folder


@functools.cache
def why_no_strace() -> str:
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=openat", "true"], capture_output=True, text=True
    )
    return "" if tried.returncode == 0 else f"strace cannot be used here: {tried.stderr[-200:]}"


def train(place: Path, name: str, inject: str, *files: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """A run of two steps, and what ``strace`` saw. Only what opens the files is slowed down."""
    if reason := why_no_strace():
        pytest.skip(reason)
    trace = place / f"{name}.trace"
    paths = [argument for file in files for argument in ("-P", str(place / file))]
    command = [
        "strace", "-f", "--seccomp-bpf", "-qq", "-e", "signal=none", "-o", str(trace), *paths,
        "-e", "trace=openat", "-e", f"inject=openat:{inject}",
        sys.executable, "-m", "megatron_lpa.pretrain", *SMALL, "--data.prefix", str(place / "data"),
        "--data.split", "100,0,0", "--train.steps", "2", "--train.eval_interval", "0", "--logging.name", name,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    return done, trace.read_text()


def test_files_that_open_at_the_second_attempt_only_are_trained_on(place: Path) -> None:
    done, trace = train(place, "second", "error=ESTALE:when=1+2", "data.idx", "data.bin", "data.json")
    assert done.returncode == 0, done.stderr[-3000:]
    for file in ("data.idx", "data.bin", "data.json"):
        lines = [line for line in trace.splitlines() if f'{file}"' in line]
        refused = [line for line in lines if "INJECTED" in line]
        assert refused and len(lines) == 2 * len(refused), trace
    assert [record["step"] for record in records(place / "runs" / "second", "train")] == [1, 2]


@pytest.mark.parametrize(
    ("file", "number"), [("data.idx", "EMFILE"), ("data.bin", "EIO"), ("data.json", "ESTALE")]
)
def test_a_file_that_never_opens_asks_for_another_start(place: Path, file: str, number: str) -> None:
    done, trace = train(place, f"never_{number}", f"error={number}:when=1+", file)
    assert done.returncode == 1, done.stderr[-3000:]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert file in error and "start again when the disk answers" in error
    assert "exit code 78" not in done.stderr and "Traceback" not in done.stderr
    assert trace.count("INJECTED") == 4
