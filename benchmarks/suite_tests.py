"""Runs the GPU's tests within a time limit, and counts what was passed also where the limit cut them
short."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands import ROOT
from benchmarks.machine import usable_cores

GATE = ("tests/kernels/test_lowdim_gpu.py",)
"""These have to pass before a tuning table may go where models look: real tiles and sizes against float64."""

GATE_OPTIONS = ("-k", "not inductor")
"""Inductor's compiler would be started by each process that runs such a test; they come later."""

INDUCTOR = "tests/kernels/test_lowdim_gpu.py::test_inductor_compiles_one_graph"
DRY = ("tests/unit/benchmarks/test_trace.py",)
"""In a dry run, in place of all others: quick, and passed on a CPU."""

NEED_NO_GPU = ("test_kernel_benchmarks.py", "test_tiles.py", "test_under_interpreter.py")
"""Tests of kernels that show nothing more on a GPU."""

KEPT_OUTPUT = 6000

# "[ 12%]" stands on the line of a finished test, with and without pytest-xdist, and not in the summary at the
# end.
OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (\w+) \S+|\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\])",
    re.MULTILINE,
)


def other_tests() -> tuple[str, ...]:
    """Tests that a GPU makes a difference to, besides those of ``GATE``."""
    tests = ROOT / "tests"
    kernels = {path for path in (tests / "kernels").glob("test_*.py") if path.name not in NEED_NO_GPU}
    found = {str(path.relative_to(ROOT)) for path in kernels | set(tests.rglob("test_*_gpu.py"))}
    return (INDUCTOR, *sorted(found - set(GATE)))


def run_tests(files: Sequence[str], log: Path, limit_s: float, options: Sequence[str] = ()) -> dict[str, Any]:
    """Runs pytest in a session of its own; in parallel where pytest-xdist is installed.

    Args:
        files: of tests, from the repository's root; also single tests.
        log: where the output goes.
        limit_s: after this, pytest and all that it started are ended.
        options: further ones of pytest.

    Returns:
        ``exit_code``, None where the limit was reached; ``counts`` of what was finished; ``passed``, whether
        all was run and nothing failed; the ``output``'s end.
    """
    usual = ["-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *usual, *files, *options]
    if importlib.util.find_spec("xdist") is not None:
        command += [
            "-n",
            str(max(1, min(14, usable_cores() - 1))),
        ]  # compiling kernels is what takes the time
    log.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered, so that nothing is lost when the process is ended.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code: int | None = process.wait(max(1.0, limit_s))
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            wait_until_gone(process.pid)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    text = log.read_text(errors="replace")
    counts = counted(text)
    passed = code == 0 and counts.get("passed", 0) > 0
    return {"exit_code": code, "counts": counts, "passed": passed, "output": text[-KEPT_OUTPUT:]}


def wait_until_gone(group: int, limit_s: float = 5.0) -> None:
    """Until no process of a killed group is left, as each may still hold the GPU; what is measured next wants
    it alone."""
    end = time.monotonic() + limit_s
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)


def counted(output: str) -> dict[str, int]:
    """How many tests had each outcome, from the lines that ``pytest -v`` writes as they finish."""
    return dict(Counter((parallel or alone).lower() for parallel, alone in OUTCOME.findall(output)))


def failed(result: dict[str, Any]) -> bool:
    """Whether something is wrong, not only unfinished."""
    return result["exit_code"] not in (0, None) or bool(result["counts"].keys() & {"failed", "error"})
