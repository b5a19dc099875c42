"""Everything that needs a GPU, within a time limit: tests, ceilings, tuning, and the benchmarks of kernels and steps.

The result file is written anew after every figure, so what was measured stays if time runs out. Tests come first:
figures of a wrong kernel are worth nothing. ``tuned`` figures use the table that this run has just measured.
Each part has to end at its share of the time; what a part leaves goes to those after it.
Needs torch, Triton, pytest, psutil and PyYAML when it is run as ``python -m benchmarks.gpu_suite``; what needs
DeepSpeed or transformers besides is recorded as missing without them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import evaluate_step, kernel, kernel_tune, step_figures, step_profile, trace, train_step
from benchmarks.kernel_timing import Setting, describe, measure_ceilings
from benchmarks.machine import usable_cores, write_result
from benchmarks.processes import ROOT
from benchmarks.step_runs import release
from megatron_lpa.ops import dispatch

HELP = "GPU tests, tuning, and benchmarks of kernels and whole steps, within a time limit"
SHARES = {
    "tests": 0.18,
    "ceilings": 0.01,
    "compile": 0.08,
    "tune": 0.12,
    "kernel": 0.10,
    "train-step": 0.34,
    "train-memory": 0.07,
    "evaluate-step": 0.05,
    "profile": 0.05,
}
"""What each part may take of the whole time; with ``--parts`` those chosen share all of it."""

NEED_NO_GPU = ("test_kernel_benchmarks.py", "test_tiles.py", "test_under_interpreter.py")
"""Tests of kernels that show nothing more on a GPU."""

KEPT_OUTPUT = 6000
BUILD = ROOT / "build" / "gpu_suite"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="limit on everything (default: 9)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the result (default: gpu_suite.json)")  # fmt: skip
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="also write the tuning table here")
    parser.add_argument("--record", action="store_true", help="write into the repository: the result under benchmarks/results/, the tuning table that models choose by; logs and traces go to build/")  # fmt: skip
    parser.add_argument("--tiles", type=int, default=5, metavar="N", help="candidates per kernel and shape (default: 5)")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=tuple(SHARES), default=list(SHARES), metavar="PART", help=f"only these of {', '.join(SHARES)}")  # fmt: skip
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the whole steps' runs, as kernels.lowdim=joined")  # fmt: skip
    parser.add_argument("--micro-batch", type=int, default=4, metavar="N", help="sequences per forward pass of whole steps (default: 4)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes and one test, to try the command without a GPU")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Runs all parts; one that fails is recorded and the next one goes on.

    Raises:
        UserError: there is no GPU and this is no dry run.
    """
    setting = kernel.checked_setting(arguments.dry_run, budget_ms=40.0)
    total_s = 60 * arguments.minutes
    output, table, aside = places(arguments)
    suite = Suite(setting, output, time.monotonic() + total_s, total_s, aside)
    steps = ["--micro-batch", str(arguments.micro_batch)]
    for change in arguments.set:
        steps += ["--set", change]
    work = {
        "tests": suite.tests,
        "ceilings": suite.ceilings,
        "compile": lambda: suite.compile_ahead(arguments.tiles),
        "tune": lambda: suite.tune(arguments.tiles, table),
        "kernel": suite.kernel,
        "train-step": lambda: suite.train_step("train_step", ["--steps", "20", "--warm-up", "3", *steps]),
        # The goal for memory is stated at one sequence, where the times of a step say little.
        "train-memory": lambda: suite.train_step("train_memory", ["--steps", "4", "--warm-up", "2", "--rounds", "1", "--models", "transformer", "lpa", "--loops", "engine", *steps, "--micro-batch", "1"]),
        "evaluate-step": lambda: suite.evaluate_step(steps[2:]),
        "profile": lambda: suite.profile(steps),
    }  # fmt: skip
    chosen = [
        name for name in work if name in arguments.parts and not (name == "tests" and arguments.skip_tests)
    ]
    suite.ends = ends_of(chosen)
    for name in chosen:
        suite.part(name, work[name])
    print(f"result: {output}", flush=True)


def ends_of(parts: Sequence[str]) -> dict[str, float]:
    """When each part has to end, as a share of the whole time."""
    whole = sum(SHARES[part] for part in parts)
    reached = itertools.accumulate(SHARES[part] / whole for part in parts)
    return dict(zip(parts, reached, strict=True))


def places(arguments: argparse.Namespace) -> tuple[Path, Path | None, Path]:
    """The result's file, the table's, and the folder of logs and traces. A dry run records nothing."""
    if arguments.dry_run and arguments.output is None:
        return BUILD / "dry_run.json", arguments.table, BUILD
    if not arguments.record or arguments.dry_run:
        output = arguments.output or Path("gpu_suite.json")
        return output, arguments.table, output.parent
    date, gpu = datetime.date.today().isoformat(), torch.cuda.get_device_name().lower()
    gpu = re.sub(r"[^a-z0-9]+", "_", gpu.removeprefix("nvidia ")).strip("_")
    output = ROOT / "benchmarks" / "results" / f"{date}_gpu_suite_{gpu}.json"
    table = dispatch.table_path(torch.cuda.get_device_capability())
    return arguments.output or output, arguments.table or table, BUILD


def gpu_tests() -> list[str]:
    """Files of tests that a GPU makes a difference to."""
    tests = ROOT / "tests"
    kernels = {path for path in (tests / "kernels").glob("test_*.py") if path.name not in NEED_NO_GPU}
    return [str(path.relative_to(ROOT)) for path in sorted(kernels | set(tests.rglob("test_*_gpu.py")))]


class Suite:
    """The result so far and the time left.

    Args:
        setting: device, dtype, time per figure.
        output: where the result goes.
        deadline: on the clock of ``time.monotonic``.
        total_s: the whole limit.
        aside: folder of logs and traces; the result's own without it.
    """

    def __init__(
        self, setting: Setting, output: Path, deadline: float, total_s: float, aside: Path | None = None
    ) -> None:
        self.aside = aside or output.parent
        self.setting, self.output, self.deadline, self.total_s = setting, output, deadline, total_s
        self.result: dict[str, Any] = {"benchmark": "gpu-suite", **describe(setting), "limit_s": total_s, "parts": {}}  # fmt: skip
        self.plans: kernel.Plans = {}
        self.stop = deadline
        self.ends: dict[str, float] = {}

    def left_s(self) -> float:
        """Until the current part has to end."""
        return self.stop - time.monotonic()

    def write(self) -> None:
        write_result(self.output, self.result)

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Runs one part, and records its time, that it had none, or its error."""
        start = time.monotonic()
        self.stop = self.deadline - (1 - self.ends.get(name, 1.0)) * self.total_s
        state = self.result["parts"][name] = {"status": "running"}
        self.write()
        try:
            if self.left_s() <= 0:
                state["status"] = "no time left"
            else:
                work()
                state["status"] = "done" if self.left_s() > 0 else "stopped at the limit"
        except ModuleNotFoundError as error:
            state |= {"status": "missing package", "package": error.name}
        except Exception as error:  # the parts that follow are worth having all the same
            state |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        release()
        state["seconds"] = round(time.monotonic() - start, 1)
        self.write()
        print(f"{name}: {state['status']}, {state['seconds']} s", flush=True)

    def tests(self) -> None:
        """The GPU's tests, and the kernels' tests on the GPU; in parallel where pytest-xdist is installed."""
        command = [sys.executable, "-m", "pytest", "-q", "-x" if self.setting.dry else "--maxfail=20", "-p", "no:cacheprovider"]  # fmt: skip
        if self.setting.dry:
            command += ["tests/kernels/test_tiles.py", "-k", "padded_rank"]
        else:
            # One that needs a package which is not there must not keep the others from running.
            command += ["--continue-on-collection-errors", *gpu_tests()]
            if importlib.util.find_spec("xdist") is not None:
                command += ["-n", "8"]  # compiling kernels is what takes the time
        self.aside.mkdir(parents=True, exist_ok=True)
        log = self.aside / f"{self.output.stem}.tests.log"
        try:
            with log.open("w") as file:
                code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=max(1.0, self.left_s())).returncode  # fmt: skip
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
        self.result["compiled"] = kernel_tune.compile_ahead(
            self.setting, shapes, tiles, workers, self.left_s()
        )

    def tune(self, tiles: int, table: Path | None) -> None:
        """Plans for the training shapes, in their order."""
        shapes = kernel_tune.default_shapes(self.setting)
        lines: list[dict[str, Any]] = []
        for line in kernel_tune.measured_lines(self.setting, list(shapes), tiles):
            lines.append(line)
            self.result["tune"] = lines
            self.plans = kernel_tune.plans_of(lines)
            self.write()
            if table is not None:
                write_result(table, kernel_tune.merged_table(table, lines, self.setting))
                dispatch.read_table.cache_clear()  # it may be the shipped table, which whole steps choose by
            print(kernel_tune.summary(line), flush=True)
            if self.left_s() <= 0:
                break

    def kernel(self) -> None:
        """The benchmark's records, the most telling shapes first."""
        self.result["kernel"] = []
        for record in kernel.records(self.setting, self.measured_ceilings(), self.plans, compiled_shapes=2):
            self.result["kernel"].append(record)
            self.write()
            print(kernel.table(record), flush=True)
            if self.left_s() <= 0:
                break

    def train_step(self, key: str, words: list[str]) -> None:
        """Every model in every loop; each in a process of its own, except in a dry run."""
        arguments = parsed(train_step, words, self.setting.dry)
        if not self.setting.dry:
            torch.cuda.empty_cache()
        for result in train_step.results(arguments, self.stop):
            self.result[key] = result
            self.write()
        print(step_figures.table(result["contenders"], result["comparisons"]), flush=True)

    def evaluate_step(self, words: list[str]) -> None:
        """Table 2's models."""
        for result in evaluate_step.results(parsed(evaluate_step, words, self.setting.dry), self.stop):
            self.result["evaluate_step"] = result
            self.write()
        print(step_figures.table(result["models"], result["comparisons"]), flush=True)

    def profile(self, words: list[str]) -> None:
        """One trace each of the Transformer and of LPA, beside the result."""
        self.result["profile"] = {}
        for preset in ("3b/lpa", "3b/transformer")[: 1 if self.setting.dry else 2]:
            if self.left_s() <= 0:
                break
            path = self.aside / f"{self.output.stem}.{preset.replace('/', '_')}.trace.json.gz"
            own = [*words, "--preset", preset, "--trace", str(path)]
            result = step_profile.profiled(parsed(step_profile, own, self.setting.dry))
            self.result["profile"][preset] = result
            self.write()
            print(trace.table(result["profile"]), flush=True)
            release()


def parsed(module: Any, words: list[str], dry: bool) -> argparse.Namespace:
    """The arguments of another benchmark."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([*words, *(["--dry-run"] if dry else [])])


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    run(own.parse_args())
