"""A run whose terminal or reader is gone: it saves, or goes on, and never ends in an error of its own
output."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from launching import SMALL, TIMEOUT_S

from megatron_lpa.checkpoint.manifest import complete_checkpoints, read_manifest

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
DATA = ["--data.prefix", "data", "--data.split", "1,0,0", "--train.eval_interval", "0"]


def command(name: str, steps: int) -> list[str]:
    entry = [sys.executable, "-m", "megatron_lpa.pretrain"]
    return [*entry, *SMALL, *DATA, "--logging.name", name, "--train.steps", str(steps)]


def own_terminal() -> None:
    """What a shell gives a command. The tests themselves may run under ``nohup``, which is inherited."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for_step(metrics: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        lines = metrics.read_text().splitlines()[:-1] if metrics.exists() else []
        if any(json.loads(line)["step"] >= step for line in lines):
            return
        time.sleep(0.05)
    raise TimeoutError(metrics)


def test_a_closed_terminal_stops_with_a_checkpoint(folder: Path) -> None:
    """What is printed after that is an error of the terminal's, and must not keep the run from saving."""
    window, terminal = os.openpty()
    process = subprocess.Popen(
        command("terminal", 4000), cwd=folder, env=os.environ | ENVIRONMENT,
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=own_terminal,
    )  # fmt: skip
    os.close(terminal)
    run = folder / "runs" / "terminal"
    try:
        wait_for_step(run / "metrics.jsonl", 3)
        os.close(window)
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGHUP
    finally:
        process.kill()
    (checkpoint,) = complete_checkpoints(run / "checkpoints")
    assert 3 <= read_manifest(checkpoint)["progress"].step < 4000


def test_a_run_goes_on_when_nobody_reads_what_it_prints(folder: Path) -> None:
    """As with ``2>&1 | tee``, once tee has gone; and under nohup a closed terminal means nothing."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        command("unread", 30), cwd=folder, env=os.environ | ENVIRONMENT, stdout=writer, stderr=writer,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    os.close(writer)
    os.close(reader)
    run = folder / "runs" / "unread"
    try:
        wait_for_step(run / "metrics.jsonl", 2)
        process.send_signal(signal.SIGHUP)
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
    assert read_manifest(complete_checkpoints(run / "checkpoints")[-1])["progress"].step == 30
