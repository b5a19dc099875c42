"""Where the time of a training step goes: a profiler's trace, and a table by kind of work, for one model.

The trace opens in chrome://tracing and in Perfetto. The profiler slows the host, so idle gaps are larger than without it:
``train-step`` has the true time of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from benchmarks import trace
from benchmarks.kernel_timing import describe, setting_of
from benchmarks.machine import versions_of, write_result
from benchmarks.step_config import LOOPS, Contender
from benchmarks.step_loops import annotated_deepspeed, build_loop
from benchmarks.step_plans import recorded_plans
from benchmarks.step_runs import device_here, run_in_process, synchronize, timed_steps
from megatron_lpa.data.storage.files import explained_write_errors
from megatron_lpa.errors import UserError

HELP = "where the time of a training step goes: a profiler's trace and a table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="3b/lpa", metavar="FAMILY/VARIANT", help="default: 3b/lpa")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=["bare"], help="as in train-step, each in a process of its own (default: bare)")  # fmt: skip
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
    parser.add_argument("--trace", type=Path, metavar="FILE.json.gz", help="where the trace goes, with the loop before its name where there are several (default: profile.json.gz)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the tables")


def run(arguments: argparse.Namespace) -> None:
    """Profiles, prints tables, records where asked.

    Raises:
        UserError: a number that cannot be, a model that does not exist, or a loop that cannot be profiled.
    """
    if arguments.steps < 1:
        raise UserError(f"--steps is {arguments.steps}; give 1 or more")
    path = arguments.trace or Path("profile.json.gz")
    profiles: dict[str, Any] = {}
    for contender in contenders_of(arguments):
        own_path = path.with_name(f"{contender.loop}_{path.name}") if len(arguments.loops) > 1 else path
        # A process of its own: DeepSpeed stays in one that has started it.
        result = run_in_process(contender, arguments.warm_up, arguments.steps, None, own_path)
        if "error" in result:
            raise UserError(f"{contender.name}: {result['error']}")
        profiles[contender.loop] = result
        write_result(arguments.output, {"benchmark": "profile", "profiles": profiles})
        print(f"{contender.name}\n{trace.table(result['profile'])}\ntrace: {own_path}")


def contenders_of(arguments: argparse.Namespace) -> list[Contender]:
    """The preset in every loop.

    Raises:
        UserError: an unknown preset, key or value.
    """
    dry = arguments.dry_run
    found = [
        Contender(
            preset="tiny/lpa" if dry else arguments.preset,
            loop=loop,
            micro_batch=1 if dry else arguments.micro_batch,
            accumulate=arguments.accumulate,
            precision="fp32" if dry else arguments.precision,
            settings=tuple(arguments.set),
            layers=1 if dry else arguments.layers,
            sequence=16 if dry else arguments.sequence,
            dry=dry,
        )
        for loop in arguments.loops
    ]
    for contender in found:
        contender.config()
    return found


def profiled(contender: Contender, warm_up: int, steps: int, path: Path) -> dict[str, Any]:
    """Profiles some steps in this process, writes the trace, and reads the table off it.

    Args:
        contender: what to profile.
        warm_up: steps before.
        steps: steps in the trace.
        path: of the trace.
    """
    device = device_here()
    loop = build_loop(contender, device)
    with recorded_plans() as plans:
        for _ in range(1 if contender.dry else warm_up):
            loop.step()
    unprofiled = timed_steps(loop, steps, device)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def export(profiler: profile) -> None:
        with explained_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))

    # The profiler's first step pays for its own start; it is left out of the trace.
    plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with (
        annotated_deepspeed() if contender.loop == "engine" else contextlib.nullcontext(),
        profile(activities=activities, schedule=plan, on_trace_ready=export) as profiler,
    ):
        for number in range(1 + steps):
            with record_function(trace.STEP):
                loop.step()
            if number in (0, steps):
                synchronize(device)
            profiler.step()
    figures = trace.summary(trace.read_events(path))
    return {
        "benchmark": "profile",
        **describe(setting_of(contender.dry, 0.0)),
        "versions": versions_of(("torch", "triton", "deepspeed", "transformers")),
        "contender": dataclasses.asdict(contender),
        "kernels": dataclasses.asdict(loop.config.kernels),
        "plans": plans,
        "attention_backend": figures.pop("attention_backend"),
        "dtype": contender.precision,
        "step_ms_without_profiler": sorted(unprofiled)[len(unprofiled) // 2],
        "profile": figures,
        "trace": path.name,
    }


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    run(own.parse_args())
