"""Everything that needs a GPU, within a time limit: tests, ceilings, whole steps, kernels, tuning, profiles.

The result file is written anew after every figure, so what was measured stays if time runs out;
``--continue`` goes on with it. Tests of the kernels come first: figures of a wrong kernel are worth nothing.
If they fail the rest is measured all the same, but the tuning table stays beside the result instead of going
where models look, and the exit code is 1. Each part has to end at its time; what a part leaves goes to those
after it. Needs torch, Triton, pytest, psutil and PyYAML when it is run as ``python -m benchmarks.gpu_suite``;
what needs DeepSpeed or transformers besides is recorded as missing without them. ``benchmarks/gpu_call.py``
brings DeepSpeed along.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import kernel
from benchmarks.commands import ROOT
from benchmarks.suite_parts import BUILD, Suite
from megatron_lpa.errors import EXIT_REFUSED, UserError
from megatron_lpa.ops import dispatch

HELP = "GPU tests, whole steps, kernels, tuning and profiles, within a time limit"
BUDGETS_S = {
    # 106 tests on 14 cores: 10 s to start the processes, then about 10 kernels of 1 to 3 s in each
    "gate": 75,
    "ceilings": 4,  # most of it the start of CUDA
    # 8 processes of 25 s, the first ones longer: 10 s of imports, 3 s of weights, 3 to 20 s of compiling, 3 +
    # 6 steps of 0.7 s
    "steps": 215,
    "steps-65k": 100,  # 4 processes of 25 s: 1 + 2 steps of 2.4 s
    "projections": 45,  # 4 shapes in 10 variants of 0.3 s, and 23 kernels of 1 to 2 s to compile
    "profile": 50,  # 2 processes of 25 s, half of it writing and reading the trace
    "memory": 35,  # 2 processes of 16 s
    "tune": 80,  # 234 kernels of 3 s on 14 cores, then 80 cases of 0.4 to 1 s; those of training come first
    "tests": 40,  # about 100 tests on 14 cores
    "projections-rest": 70,  # 3 shapes and 6 of decoding; then torch.compile, 5 to 15 s a function
    "llama": 100,  # 2 processes, the first one with 40 s of torch.compile
    "evaluate-step": 30,  # six models, built in 5 s; ten rounds of turns of 2 s
    "profile-bare": 45,  # 2 processes of 22 s
    "same-param": 70,  # 4 processes of 18 s
}
"""The parts, the most telling first, and what each may take: estimates, not measured. One call's nine minutes
hold those up to the engine's profile; a second one with ``--continue`` has the rest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="limit on everything (default: 9)")  # fmt: skip  # noqa: E501
    parser.add_argument(
        "--until", type=float, help=argparse.SUPPRESS
    )  # limit on the clock of time.monotonic, for gpu_call
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the result (default: gpu_suite.json)")  # fmt: skip  # noqa: E501
    parser.add_argument("--continue", dest="earlier", type=Path, metavar="FILE.json", help="keep this result's figures and measure what is missing; may be the same file as --output")  # fmt: skip  # noqa: E501
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="write the tuning table here too, if the tests passed; it is always written beside the result")  # fmt: skip  # noqa: E501
    parser.add_argument("--record", action="store_true", help="write into the repository: the result under benchmarks/results/, the tuning table that models choose by; logs and traces go to build/")  # fmt: skip  # noqa: E501
    parser.add_argument("--tiles", type=int, default=5, metavar="N", help="candidates per kernel and shape (default: 5)")  # fmt: skip  # noqa: E501
    parser.add_argument("--parts", nargs="+", choices=tuple(BUDGETS_S), default=list(BUDGETS_S), metavar="PART", help=f"only these of {', '.join(BUDGETS_S)}")  # fmt: skip  # noqa: E501
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the whole steps' runs, as kernels.lowdim=joined")  # fmt: skip  # noqa: E501
    parser.add_argument("--micro-batch", type=int, default=4, metavar="N", help="sequences per forward pass of whole steps (default: 4)")  # fmt: skip  # noqa: E501
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes and a few tests, to try the command without a GPU")  # fmt: skip  # noqa: E501


def run(arguments: argparse.Namespace) -> None:
    """Runs all parts; one that fails is recorded and the next one goes on.

    Raises:
        UserError: there is no GPU and this is no dry run, or the earlier result cannot be gone on with.
        SystemExit: at the end, if a part failed.
    """
    setting = kernel.checked_setting(arguments.dry_run, budget_ms=40.0)
    output, table, aside = places(arguments)
    total_s = 60 * arguments.minutes if arguments.until is None else arguments.until - time.monotonic()
    suite = Suite(setting, output, total_s, arguments.earlier, aside)
    chosen = [name for name in BUDGETS_S if name in arguments.parts]
    if arguments.skip_tests:
        chosen = [name for name in chosen if name not in ("gate", "tests")]
    # Who leaves the tests out vouches for the kernels, unless an earlier call has seen them fail.
    suite.trusted = "gate" not in chosen and suite.result["parts"].get("gate", {}).get("status") != "failed"
    work = works(suite, arguments, table)
    for name, end_s in zip(chosen, ends_s(chosen, total_s), strict=True):
        suite.part(name, work[name], end_s)
    print(f"result: {output}", flush=True)
    if failed := suite.failed_parts():
        sys.exit(f"failed: {', '.join(failed)}")


def works(suite: Suite, arguments: argparse.Namespace, table: Path | None) -> dict[str, Callable[[], None]]:
    """What each part does."""
    settings = [word for change in arguments.set for word in ("--set", change)]
    steps = ["--micro-batch", str(arguments.micro_batch), *settings]
    two = ["--models", "transformer", "lpa"]
    timed = ["--steps", "12", "--warm-up", "3", *steps]
    # As many tokens as 16 sequences have, where the optimizer weighs less. Each step warms up four times.
    many = ["--accumulate", "4", "--steps", "4", "--warm-up", "1", *steps]
    few = ["--micro-batch", "1", "--steps", "4", "--warm-up", "2", "--rounds", "1", *settings]
    profile = ["--steps", "2", "--warm-up", "3", *steps]
    return {
        "gate": suite.gate,
        "ceilings": suite.ceilings,
        "steps": lambda: suite.train_step("train_step", [*two, "--loops", "bare", "engine", *timed]),
        "steps-65k": lambda: suite.train_step("train_step_65k", ["--models", "transformer", "--loops",
        "bare", "engine", *many]),
        "projections": lambda: suite.projections(quick=True),
        "profile": lambda: suite.profile("engine", profile),
        # The goal for memory is stated at one sequence, where the times of a step say little.
        "memory": lambda: suite.train_step("train_memory", [*two, "--loops", memory_loop(), *few]),
        "tune": lambda: suite.tune(arguments.tiles, table),
        "tests": suite.tests,
        "projections-rest": lambda: suite.projections(quick=False),
        "llama": lambda: suite.train_step("train_step", [*two, *timed]),
        "evaluate-step": lambda: suite.evaluate_step(settings),
        "profile-bare": lambda: suite.profile("bare", profile),
        "same-param": lambda: suite.train_step("train_step", timed),
    }  # fmt: skip


def memory_loop() -> str:
    """The loop whose memory is compared. Both hold the same states, so the bare one will do without
    DeepSpeed."""
    return "engine" if importlib.util.find_spec("deepspeed") is not None else "bare"


def ends_s(parts: Sequence[str], total_s: float) -> list[float]:
    """When each part has to end, in seconds from the start: by the budgets, which are stretched where they
    leave time."""
    whole = sum(BUDGETS_S[part] for part in parts)
    stretch = max(1.0, total_s / whole)
    return [stretch * sum(BUDGETS_S[part] for part in parts[: number + 1]) for number in range(len(parts))]


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


def main(argv: Sequence[str] | None = None) -> None:
    """The command. SIGTERM ends it like Ctrl-C: what it started is ended, and the result is whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
