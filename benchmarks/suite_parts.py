"""The parts of the GPU suite (``benchmarks/gpu_suite.py``). Each measures what the result does not have
yet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
from benchmarks.commands import ROOT
from benchmarks.kernel_cases import default_jobs
from benchmarks.kernel_compile import compile_ahead
from benchmarks.kernel_timing import Ceilings, device_name, measure_ceilings
from benchmarks.machine import write_result
from benchmarks.step_runs import run_in_process
from benchmarks.suite_state import OutOfTime, SuiteState
from megatron_lpa.ops import dispatch

BUILD = ROOT / "build" / "gpu_suite"
"""Traces of the bare loop: few files can be brought back from a machine, and its table stays in the
result."""

QUICK_SHAPES = 4
"""Training shapes of the first look at projections."""


class Suite(SuiteState):
    """As ``SuiteState``."""

    trusted = False
    """That kernels compute what they should: a tuning table may go where models look."""

    def gate(self) -> None:
        """The tests that a tuning table has to wait for.

        Raises:
            RuntimeError: one failed, or none ran.
            OutOfTime: they were not finished, which says nothing against the kernels, and nothing for them.
        """
        earlier = self.result["parts"]["gate"]["code"]
        kept = self.result.get("tests", {}).get("gate")
        self.trusted = kept is not None and kept["passed"] and earlier[-1:] == [self.code]
        if not self.trusted:
            self.trusted = self.run_tests("gate", suite_tests.GATE, suite_tests.GATE_OPTIONS)["passed"]
        found = self.result["tests"]["gate"]
        if not self.trusted and suite_tests.failed(found):
            raise RuntimeError(f"tests failed: {found['counts']}")
        if not self.trusted and found["exit_code"] is None:
            raise OutOfTime
        if not self.trusted:
            raise RuntimeError("no test ran: all were skipped")

    def tests(self) -> None:
        """All other tests that a GPU makes a difference to.

        Raises:
            RuntimeError: a test failed. Unfinished ones say nothing against the kernels.
        """
        if self.result.get("tests", {}).get("others") is not None:
            return
        found = self.run_tests("others", suite_tests.other_tests(), ())
        if suite_tests.failed(found):
            raise RuntimeError(f"tests failed: {found['counts']}")

    def run_tests(self, name: str, tests: tuple[str, ...], options: tuple[str, ...]) -> dict[str, Any]:
        if self.setting.dry:
            tests, options = suite_tests.DRY, ()
        log = self.aside / f"{self.output.stem}.tests_{name}.log"
        found = suite_tests.run_tests(tests, log, self.left_s(), options)
        self.record("tests", self.result.get("tests", {}) | {name: found})
        print(found["output"][-1500:], flush=True)
        return found

    def ceilings(self) -> None:
        """A large matrix product and a large copy."""
        print(kernel.ceilings_line(self.measured_ceilings()), flush=True)

    def measured_ceilings(self) -> Ceilings:
        if "ceilings" not in self.result:
            self.record("ceilings", vars(measure_ceilings(self.setting)))
        return Ceilings(**self.result["ceilings"])

    def train_step(self, key: str, words: list[str]) -> None:
        """Models in loops; each in a process of its own, except in a dry run."""
        arguments = parsed(train_step, words, self.setting.dry)
        known = self.result.get(key, {}).get("contenders", [])
        known = [record for record in known if "step_ms" in record or "error" in record]
        asked = [train_step.described(contender) for contender in train_step.unmeasured(arguments, known)]
        if not asked:
            return
        if not self.setting.dry:
            torch.cuda.empty_cache()
        for result in train_step.results(arguments, self.stop, known, len(self.result["calls"])):
            self.record(key, result)
        print(step_figures.table(result["contenders"], result["comparisons"]), flush=True)
        raise_for_errors([record for record in result["contenders"] if record["contender"] in asked])

    def projections(self, quick: bool) -> None:
        """The kernel benchmark's records, the most telling shapes first.

        Args:
            quick: the first training shapes alone, as they are before tuning.
        """
        known = self.result.get("kernel", [])
        told = kernel.errors(known)
        for found in kernel.records(
            self.setting,
            self.measured_ceilings(),
            self.tuned_here(),
            QUICK_SHAPES if quick else None,
            self.left_s,
            known,
            quick,
        ):
            self.record("kernel", found)
        if self.measured:
            for record in self.result["kernel"]:
                print(kernel.table(record), flush=True)
        errors = [error for error in kernel.errors(self.result.get("kernel", [])) if error not in told]
        if errors:
            raise RuntimeError("; ".join(errors)[:2000])

    def profile(self, loop: str, words: list[str]) -> None:
        """Where a step's time goes, for both models, each in a process of its own.

        Raises:
            RuntimeError: a profile failed; the other one is measured all the same.
        """
        found = dict(self.result.get("profile", {}))
        errors = []
        for preset in ("3b/transformer", "3b/lpa")[1 if self.setting.dry else 0 :]:
            arguments = parsed(step_profile, [*words, "--loops", loop, "--preset", preset], self.setting.dry)
            (contender,) = step_profile.contenders_of(arguments)
            known = found.get(contender.name)
            if known is not None and known["contender"] == train_step.described(contender):
                continue
            if self.left_s() <= 0:
                return
            path = self.trace_path(contender.name, loop)
            limit_s = self.left_s()
            result = train_step.missing(contender) or run_in_process(
                contender, arguments.warm_up, arguments.steps, limit_s, path
            )
            found[contender.name] = {"contender": train_step.described(contender), **result}
            self.record("profile", found)
            if "error" not in result:
                print(f"{contender.name}\n{trace.table(result['profile'])}", flush=True)
            elif not {"out_of_time", "missing_package"} & result.keys():
                errors.append(f"{contender.name}: {result['error']}")
        if errors:
            raise RuntimeError("; ".join(errors))

    def trace_path(self, name: str, loop: str) -> Path:
        """Beside the result for the engine; few files can be brought back from a machine."""
        folder = self.aside if loop == "engine" else BUILD
        return folder / f"{self.output.stem}.{name.replace('/', '_').replace(' ', '_')}.trace.json.gz"

    def tune(self, tiles: int, table: Path | None) -> None:
        """Compiles the kernels and measures plans, the most telling cases first.

        The table goes beside the result, and, if the tests passed, where ``table`` says.
        """
        lines: list[dict[str, Any]] = list(self.result.get("tune", []))
        jobs = kernel_tune.unmeasured(self.setting, default_jobs(self.setting), lines)
        reason = dispatch.why_not_fused(
            kernel_tune.case_of(self.setting, default_jobs(self.setting)[0]), self.setting.device.type
        )
        if reason is not None:
            self.note("tune", f"the kernel was not timed: {reason}")
        elif jobs:
            workers = 0 if self.setting.dry else kernel_tune.workers()
            compiled = jobs[-1 if self.setting.dry else 0 :]
            self.record("compiled", compile_ahead(self.setting, compiled, tiles, workers, self.left_s() / 2))
        for line in kernel_tune.measured_lines(self.setting, jobs, tiles, lambda: self.left_s() <= 0):
            lines.append(line)
            self.record("tune", lines)
            self.write_table(lines, table)
            print(kernel_tune.summary(line), flush=True)
        if lines:
            self.write_table(lines, table)  # of kept lines, after tests that passed only now

    def write_table(self, lines: list[dict[str, Any]], table: Path | None) -> None:
        beside = self.output.with_name(f"{self.output.stem}.table.json")
        content = kernel_tune.merged_table(table or beside, lines, self.setting)
        write_result(beside, content)
        shipped = table is not None and self.trusted
        if table is not None and shipped:
            write_result(table, content)
            dispatch.forget_tables()  # it may be the shipped table, which whole steps choose by
        self.result["table"] = str(table if shipped else beside)

    def tuned_here(self) -> kernel.Table | None:
        """The plans that this result's cases say, None before any was tuned."""
        if not self.result.get("tune"):
            return None
        on_gpu = self.setting.device.type == "cuda"
        capability = torch.cuda.get_device_capability() if on_gpu else (9, 0)
        lines = {"cases": self.result["tune"]}
        return dispatch.parse_table(lines, self.output, capability, device_name(self.setting))

    def evaluate_step(self, words: list[str]) -> None:
        """Table 2's models."""
        arguments = parsed(evaluate_step, words, self.setting.dry)
        known = self.result.get("evaluate_step", {}).get("models", [])
        asked = evaluate_step.unmeasured(arguments, known)
        if not asked:
            return
        for result in evaluate_step.results(arguments, self.stop, known):
            self.record("evaluate_step", result)
        print(step_figures.table(result["models"], result["comparisons"]), flush=True)
        raise_for_errors([record for record in result["models"] if record["preset"] in asked])


def raise_for_errors(records: Sequence[dict[str, Any]]) -> None:
    """What ran out of time or memory, or lacks a package, is a finding; anything else is a fault.

    Args:
        records: of what the part itself has measured: a fault is told once.

    Raises:
        RuntimeError: there was one; the other figures are recorded.
    """
    known = {"out_of_time", "out_of_memory", "missing_package"}
    faults = [
        record for record in records if {"error", "later_error"} & record.keys() and not known & record.keys()
    ]
    if faults:
        told = [
            f"{r['preset']} {r.get('loop', '')}: {r.get('error') or r['later_error']}"[:500] for r in faults
        ]
        raise RuntimeError("; ".join(told))


def parsed(module: Any, words: list[str], dry: bool) -> argparse.Namespace:
    """The arguments of another benchmark."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([*words, *(["--dry-run"] if dry else [])])
