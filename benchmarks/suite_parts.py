"""The parts of the GPU suite (``benchmarks/gpu_suite.py``), and the result that they fill."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    evaluate_step,
    kernel,
    kernel_tune,
    step_figures,
    step_profile,
    suite_tests,
    trace,
    train_step,
)
from benchmarks.kernel_cases import default_jobs
from benchmarks.kernel_compile import compile_ahead
from benchmarks.kernel_timing import Setting, describe, device_name, measure_ceilings
from benchmarks.machine import write_result
from benchmarks.step_runs import release
from megatron_lpa.ops import dispatch


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
        self.tuned: kernel.Table = {}
        self.trusted = False  # that kernels compute what they should
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
        state: dict[str, Any] = {"status": "running"}
        self.result["parts"][name] = state
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
        """The GPU's tests, and the kernels' tests on the GPU.

        Raises:
            RuntimeError: a test failed, or those that the tuning table has to wait for were not finished.
        """
        self.trusted = False
        groups = {
            "gate": list(suite_tests.GATE),
            "others": [*suite_tests.gpu_tests()[len(suite_tests.GATE) :]],
        }
        options: list[str] = []
        if self.setting.dry:
            groups, options = {"gate": ["tests/kernels/test_tiles.py"]}, ["-k", "padded_rank"]
        results = self.result["tests"] = {}
        for name, files in groups.items():
            log = self.aside / f"{self.output.stem}.tests_{name}.log"
            results[name] = suite_tests.run_tests(files, log, self.left_s(), options)
            self.write()
            print(results[name]["output"][-1500:], flush=True)
        # Others that are unfinished say nothing against the kernels.
        self.trusted = results["gate"]["passed"] and not any(map(suite_tests.failed, results.values()))
        if not self.trusted:
            raise RuntimeError(
                f"tests did not pass: { {name: found['counts'] for name, found in results.items()} }"
            )

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
        if importlib.util.find_spec("triton") is None or (
            self.setting.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"
        ):
            return
        workers = 0 if self.setting.dry else kernel_tune.workers()
        jobs = default_jobs(self.setting)[-1 if self.setting.dry else 0 :]
        self.result["compiled"] = compile_ahead(self.setting, jobs, tiles, workers, self.left_s())

    def tune(self, tiles: int, table: Path | None) -> None:
        """Plans, the most telling cases first. Where tests failed the table goes beside the result."""
        if table is not None and not self.trusted:
            table = self.output.with_name(f"{self.output.stem}.table.json")
        self.result["table"] = None if table is None else str(table)
        capability = torch.cuda.get_device_capability() if self.setting.device.type == "cuda" else (9, 0)
        lines: list[dict[str, Any]] = []
        for line in kernel_tune.measured_lines(
            self.setting, default_jobs(self.setting), tiles, lambda: self.left_s() <= 0
        ):
            lines.append(line)
            self.result["tune"] = lines
            self.tuned = dispatch.parse_table(
                {"cases": lines}, self.output, capability, device_name(self.setting)
            )
            self.write()
            if table is not None:
                write_result(table, kernel_tune.merged_table(table, lines, self.setting))
                dispatch.read_table.cache_clear()  # it may be the shipped table, which whole steps choose by
            print(kernel_tune.summary(line), flush=True)

    def kernel(self) -> None:
        """The benchmark's records, the most telling shapes first."""
        shown = 0
        for found in kernel.records(
            self.setting, self.measured_ceilings(), self.tuned or None, left_s=self.left_s
        ):
            self.result["kernel"] = found
            self.write()
            if len(found) > shown:  # afterwards come the compiled variants, one by one
                shown = len(found)
                print(kernel.table(found[-1]), flush=True)
        for record in self.result.get("kernel", []):
            print(kernel.table(record), flush=True)

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
