"""Where the time of a training step goes: a profiler's trace, and a table by kind of work, for one model.

The trace opens in chrome://tracing and in Perfetto. The profiler slows the host, so idle gaps are larger than without it:
``train-step`` has the true time of a step.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from benchmarks import trace
from benchmarks.kernel_timing import describe, setting_of
from benchmarks.machine import versions_of, write_result
from benchmarks.step_config import LOOPS, Contender
from benchmarks.step_loops import build_loop
from benchmarks.step_runs import device_here, synchronize, timed_steps
from megatron_lpa.data.storage.files import explained_write_errors
from megatron_lpa.errors import UserError

HELP = "where the time of a training step goes: a profiler's trace and a table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="3b/lpa", metavar="FAMILY/VARIANT", help="default: 3b/lpa")
    parser.add_argument("--loop", choices=LOOPS, default="bare", help="as in train-step (default: bare)")
    parser.add_argument("--micro-batch", type=int, default=4, metavar="N", help="sequences per forward pass (default: 4)")  # fmt: skip
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per step (default: 1)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps in the trace (default: 3)")
    parser.add_argument(
        "--warm-up", type=int, default=4, metavar="N", help="steps before the trace (default: 4)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers instead of the preset's")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens per sequence instead of the preset's")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run, as kernels.lowdim=joined; can be given again")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, to try the command")
    parser.add_argument("--trace", type=Path, metavar="FILE.json.gz", help="where the trace goes (default: profile.json.gz)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the table")


def run(arguments: argparse.Namespace) -> None:
    """Profiles, prints the table, records where asked.

    Raises:
        UserError: a number that cannot be, a model that does not exist, or a missing package.
    """
    try:
        result = profiled(arguments)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the package {error.name} is missing; install it or choose another --loop"
        ) from error
    write_result(arguments.output, result)
    print(trace.table(result["profile"]))
    print(f"trace: {result['trace']}")


def profiled(arguments: argparse.Namespace) -> dict[str, Any]:
    """Profiles some steps, writes the trace, and reads the table off it."""
    if arguments.steps < 1:
        raise UserError(f"--steps is {arguments.steps}; give 1 or more")
    contender = Contender(
        preset="tiny/lpa" if arguments.dry_run else arguments.preset,
        loop=arguments.loop,
        micro_batch=1 if arguments.dry_run else arguments.micro_batch,
        accumulate=arguments.accumulate,
        precision="fp32" if arguments.dry_run else arguments.precision,
        settings=tuple(arguments.set),
        layers=1 if arguments.dry_run else arguments.layers,
        sequence=16 if arguments.dry_run else arguments.sequence,
        dry=arguments.dry_run,
    )
    device = device_here()
    loop = build_loop(contender, device)
    for _ in range(1 if arguments.dry_run else arguments.warm_up):
        loop.step()
    unprofiled = timed_steps(loop, arguments.steps, device)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    path = arguments.trace or Path("profile.json.gz")

    def export(profiler: profile) -> None:
        with explained_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))

    # The profiler's first step pays for its own start; it is left out of the trace.
    plan = schedule(wait=0, warmup=1, active=arguments.steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=export) as profiler:
        for number in range(1 + arguments.steps):
            with record_function(trace.STEP):
                loop.step()
            if number in (0, arguments.steps):
                synchronize(device)
            profiler.step()
    return {
        "benchmark": "profile",
        **describe(setting_of(arguments.dry_run, 0.0)),
        "versions": versions_of(("torch", "triton", "deepspeed", "transformers")),
        "contender": dataclasses.asdict(contender),
        "kernels": dataclasses.asdict(loop.config.kernels),
        "dtype": contender.precision,
        "step_ms_without_profiler": sorted(unprofiled)[len(unprofiled) // 2],
        "profile": trace.summary(trace.read_events(path)),
        "trace": path.name,
    }


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    run(own.parse_args())
