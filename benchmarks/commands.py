"""Running a command as its users do, and measuring it from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_lpa.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Finished:
    """A command that ended well.

    Args:
        seconds: from its start to its end, Python's own start included.
        stdout: what it printed.
        peak_memory_bytes: the most memory that it and its descendants held together; ``None`` unless sampled.
        memory_kind: ``PSS`` (shared pages are divided among those who share them) or, where the system does
            not tell, ``RSS`` (they count for each).
    """

    seconds: float
    stdout: str
    peak_memory_bytes: int | None = None
    memory_kind: str | None = None


def run_command(name: str, command: Sequence[str], sample_memory: bool = False) -> Finished:
    """Runs a command in the repository's root.

    Sampling looks at all descendants 20 times a second, which costs time itself.

    Raises:
        UserError: it failed.
    """
    os.sync()  # what an earlier command left to be written would slow this one
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        start = time.perf_counter()
        # A session of its own, to end its workers too when this is interrupted.
        process = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            peak, kind = _watch(process) if sample_memory else (None, None)
            process.wait()
            seconds = time.perf_counter() - start
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        for stream in (stdout, stderr):
            stream.seek(0)
        if process.returncode:
            message = "\n".join(stderr.read().splitlines()[-12:])
            raise UserError(f"{name} failed with exit code {process.returncode}:\n{message}")
        return Finished(seconds, stdout.read(), peak, kind)


def _watch(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    peak, kind = 0, "PSS"
    parent = psutil.Process(process.pid)
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):
            total = 0
            for member in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    size = _pss_bytes(member) if kind == "PSS" else None
                    if size is None:
                        kind, size = "RSS", member.memory_info().rss
                    total += size
            peak = max(peak, total)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAMPLE_INTERVAL_S)
            return peak, kind


def _pss_bytes(process: psutil.Process) -> int | None:
    try:
        return getattr(process.memory_full_info(), "pss", None)
    except psutil.AccessDenied:
        return None
