"""Everything that needs a GPU, within a time limit: tests, ceilings, tuning, and the benchmarks of kernels and steps.

The result file is written anew after every figure, so what was measured stays if time runs out. Tests come first:
figures of a wrong kernel are worth nothing. If they fail the rest is measured all the same, but the table of tiles goes beside
the result instead of where models look, and the exit code is 1. ``tuned`` figures use the table that this run measures.
Each part has to end at its share of the time; what a part leaves goes to those after it.
Needs torch, Triton, pytest, psutil and PyYAML when it is run as ``python -m benchmarks.gpu_suite``; what needs
DeepSpeed or transformers besides is recorded as missing without them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import kernel
from benchmarks.processes import ROOT
from benchmarks.suite_parts import Suite
from megatron_lpa.ops import dispatch

HELP = "GPU tests, tuning, and benchmarks of kernels and whole steps, within a time limit"
SHARES = {
    "tests": 0.20,  # 108 s: 200 tests, each compiling a few kernels, on 14 cores
    "ceilings": 0.01,  # 5 s, most of it the start of CUDA
    "compile": 0.10,  # 54 s: 234 kernels of 3 s on 14 cores, those of training first, and 10 s to start the processes
    "tune": 0.10,  # 54 s: 84 cases of 0.4 to 1 s; those of training are the first 37
    "kernel": 0.12,  # 65 s: 7 training shapes and 6 of decoding, about 25 s; then torch.compile, 5 to 15 s a function
    "train-step": 0.30,  # 162 s: a process of 3B takes about 22 s; four for the first pair, then Llama's 60 s
    "train-memory": 0.07,  # 38 s: two processes
    "evaluate-step": 0.05,  # 27 s: six models, built in 5 s; a round of turns takes 3 s
    "profile": 0.05,  # 27 s: two models
}
"""What each part may take of the whole time; with ``--parts`` those chosen share all of it. Seconds are those of the default
nine minutes, and what a part is expected to need: estimates, not measured."""

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
        SystemExit: at the end, if a part failed.
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
        "train-memory": lambda: suite.train_step("train_memory", ["--steps", "4", "--warm-up", "2", "--rounds", "1", "--models", "transformer", "lpa", "--loops", *memory_loops(), *steps, "--micro-batch", "1"]),
        "evaluate-step": lambda: suite.evaluate_step(steps[2:]),
        "profile": lambda: suite.profile(steps),
    }  # fmt: skip
    chosen = [
        name for name in work if name in arguments.parts and not (name == "tests" and arguments.skip_tests)
    ]
    suite.ends = ends_of(chosen)
    suite.trusted = "tests" not in chosen  # who leaves the tests out vouches for the kernels
    for name in chosen:
        suite.part(name, work[name])
    print(f"result: {output}", flush=True)
    failed = [name for name, state in suite.result["parts"].items() if state["status"] == "failed"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def memory_loops() -> list[str]:
    """The loops whose memory is compared; both hold the same states, so the bare one will do without DeepSpeed."""
    return ["bare", "engine"] if importlib.util.find_spec("deepspeed") is not None else ["bare"]


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


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    run(own.parse_args())
