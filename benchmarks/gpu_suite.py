"""Everything that needs a GPU, within a time limit: tests, ceilings, tuning, the kernel's benchmark.

The result file is written anew after every figure, so what was measured stays if time runs out. Tests come first:
figures of a wrong kernel are worth nothing. ``tuned`` figures use the table that this run has just measured.
Needs torch, Triton, pytest, psutil and nothing else of the package's dependencies when it is run as
``python -m benchmarks.gpu_suite``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import kernel, kernel_tune
from benchmarks.kernel_timing import Setting, describe, measure_ceilings
from benchmarks.machine import usable_cores, write_result
from benchmarks.processes import ROOT

HELP = "GPU tests, tuning and kernel benchmarks within a time limit"
TEST_SHARE = 0.30
COMPILE_SHARE = 0.15
TUNE_SHARE = 0.25
KEPT_OUTPUT = 6000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="limit on everything (default: 9)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("gpu_suite.json"), metavar="FILE.json", help="the result (default: gpu_suite.json)")  # fmt: skip
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="also write the tuning table here")
    parser.add_argument("--tiles", type=int, default=5, metavar="N", help="candidates per kernel and shape (default: 5)")  # fmt: skip
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes and one test, to try the command without a GPU")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Runs all parts; one that fails is recorded and the next one goes on.

    Raises:
        UserError: there is no GPU and this is no dry run.
    """
    setting = kernel.checked_setting(arguments.dry_run, budget_ms=40.0)
    suite = Suite(
        setting, arguments.output, time.monotonic() + 60 * arguments.minutes, 60 * arguments.minutes
    )
    if not arguments.skip_tests:
        suite.part("tests", lambda: suite.tests(TEST_SHARE * suite.total_s))
    suite.part("ceilings", suite.ceilings)
    suite.part("compile", lambda: suite.compile_ahead(arguments.tiles))
    suite.part("tune", lambda: suite.tune(arguments.tiles, arguments.table))
    suite.part("kernel", suite.kernel)
    print(f"result: {arguments.output}", flush=True)


class Suite:
    """The result so far and the time left.

    Args:
        setting: device, dtype, time per figure.
        output: where the result goes.
        deadline: on the clock of ``time.monotonic``.
        total_s: the whole limit.
    """

    def __init__(self, setting: Setting, output: Path, deadline: float, total_s: float) -> None:
        self.setting, self.output, self.deadline, self.total_s = setting, output, deadline, total_s
        self.result: dict[str, Any] = {"benchmark": "gpu-suite", **describe(setting), "limit_s": total_s, "parts": {}}  # fmt: skip
        self.plans: kernel.Plans = {}

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        write_result(self.output, self.result)

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Runs one part, and records its time, that it had none, or its error."""
        start = time.monotonic()
        state = self.result["parts"][name] = {"status": "running"}
        self.write()
        try:
            if self.left_s() <= 0:
                state["status"] = "no time left"
            else:
                work()
                state["status"] = "done" if self.left_s() > 0 else "stopped at the limit"
        except Exception as error:  # the parts that follow are worth having all the same
            state |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        state["seconds"] = round(time.monotonic() - start, 1)
        self.write()
        print(f"{name}: {state['status']}, {state['seconds']} s", flush=True)

    def tests(self, limit_s: float) -> None:
        """The GPU's tests, and the kernels' tests on the GPU; in parallel where pytest-xdist is installed."""
        command = [sys.executable, "-m", "pytest", "-q", "-x" if self.setting.dry else "--maxfail=20", "-p", "no:cacheprovider"]  # fmt: skip
        if self.setting.dry:
            command += ["tests/kernels/test_tiles.py", "-k", "padded_rank"]
        else:
            command += ["tests/kernels/test_lowdim_gpu.py", "tests/kernels/test_lowdim_kernel.py"]
            if importlib.util.find_spec("xdist") is not None:
                command += ["-n", "8"]  # compiling kernels is what takes the time
        log = self.output.with_suffix(".tests.log")
        try:
            with log.open("w") as file:
                code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=max(1.0, limit_s)).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
        text = log.read_text(errors="replace")
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}  # fmt: skip
        self.result["tests"] = {"exit_code": code, "counts": counts, "output": text[-KEPT_OUTPUT:]}
        print(text[-1500:], flush=True)

    def ceilings(self) -> None:
        """A large matrix product and a large copy."""
        self.result["ceilings"] = vars(self.measured_ceilings())
        print(kernel.ceilings_line(self.measured_ceilings()), flush=True)

    def measured_ceilings(self) -> Any:
        if not hasattr(self, "_ceilings"):
            self._ceilings = measure_ceilings(self.setting)
        return self._ceilings

    def compile_ahead(self, tiles: int) -> None:
        """The kernels that tuning will time."""
        shapes = kernel_tune.default_shapes(self.setting)[-1 if self.setting.dry else 0 :]
        workers = 0 if self.setting.dry else min(8, usable_cores())
        if importlib.util.find_spec("triton") is None or (
            self.setting.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"
        ):
            return
        limit_s = COMPILE_SHARE * self.total_s
        self.result["compiled"] = kernel_tune.compile_ahead(self.setting, shapes, tiles, workers, limit_s)

    def tune(self, tiles: int, table: Path | None) -> None:
        """Plans for the training shapes, in their order, until its share of the time is used."""
        shapes = kernel_tune.default_shapes(self.setting)
        stop = time.monotonic() + TUNE_SHARE * self.total_s
        lines: list[dict[str, Any]] = []
        for line in kernel_tune.measured_lines(self.setting, list(shapes), tiles):
            lines.append(line)
            self.result["tune"] = lines
            self.plans = kernel_tune.plans_of(lines)
            self.write()
            if table is not None:
                write_result(table, kernel_tune.merged_table(table, lines, self.setting))
            print(kernel_tune.summary(line), flush=True)
            if time.monotonic() > min(stop, self.deadline):
                break

    def kernel(self) -> None:
        """The benchmark's records until the limit."""
        self.result["kernel"] = []
        for record in kernel.records(self.setting, self.measured_ceilings(), self.plans, compiled_shapes=2):
            self.result["kernel"].append(record)
            self.write()
            print(kernel.table(record), flush=True)
            if self.left_s() <= 0:
                break


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    run(own.parse_args())
