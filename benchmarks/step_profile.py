"""Where the time of a training step goes: a profiler's trace, and a table by kind of work, for one model.

The trace opens in chrome://tracing and in Perfetto. The profiler slows the host, so idle gaps are larger than
without it: ``train-step`` has the true time of a step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import trace
from benchmarks.machine import write_result
from benchmarks.step_config import LOOPS, Contender
from benchmarks.step_runs import run_in_process
from megatron_lpa.errors import UserError

HELP = "where the time of a training step goes: a profiler's trace and a table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="3b/lpa", metavar="FAMILY/VARIANT", help="default: 3b/lpa")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=["bare"], help="as in train-step, each in a process of its own (default: bare)")  # fmt: skip  # noqa: E501
    parser.add_argument("--micro-batch", type=int, default=4, metavar="N", help="sequences per forward pass (default: 4)")  # fmt: skip  # noqa: E501
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per step (default: 1)")  # fmt: skip  # noqa: E501
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps in the trace (default: 3)")
    parser.add_argument(
        "--warm-up", type=int, default=4, metavar="N", help="steps before the trace (default: 4)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers instead of the preset's")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens per sequence instead of the preset's")  # fmt: skip  # noqa: E501
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run, as kernels.lowdim=joined; can be given again")  # fmt: skip  # noqa: E501
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, to try the command")
    parser.add_argument("--trace", type=Path, metavar="FILE.json.gz", help="where the trace goes, with the loop before its name where there are several (default: profile.json.gz)")  # fmt: skip  # noqa: E501
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


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    run(own.parse_args())
