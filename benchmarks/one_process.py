"""What the engine costs in one process, at each ZeRO stage, beside the bare loop of the same model.

Bare: the decoder with its loss, clipping and PyTorch's fused AdamW. Both loops are in this process and take
turns of one step, in alternating order, so that whatever slows the machine slows both; each stage has a bare
loop beside it. The ratio is of the two medians. ``cpu_ratio`` is that of the processor's time, which leaves
out what other processes took. One
thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine, versions_of, warn_if_busy, write_result
from benchmarks.step_config import Contender
from benchmarks.step_figures import spread
from benchmarks.step_loops import Loop, build_loop
from benchmarks.step_timing import device_here, release, timed_steps
from megatron_lpa.config.precision import PRECISIONS
from megatron_lpa.errors import UserError

HELP = "what the engine costs in one process, at each ZeRO stage"
STAGES = ("zero0", "zero1", "zero2", "zero3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="s2_small/lpa", metavar="FAMILY/VARIANT", help="default: s2_small/lpa")  # fmt: skip  # noqa: E501
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[2, 8], metavar="N", help="sequences per step, one comparison each (default: 2 8: 512 and 2,048 tokens)")  # fmt: skip  # noqa: E501
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per step (default: 1)")  # fmt: skip  # noqa: E501
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps measured of each (default: 20)")  # fmt: skip  # noqa: E501
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers instead of the preset's")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens per sequence instead of the preset's")  # fmt: skip  # noqa: E501
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run, as kernels.loss=chunked; can be given again")  # fmt: skip  # noqa: E501
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, to try the command")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the result, after each comparison")  # fmt: skip  # noqa: E501


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a line for each comparison, records where asked.

    Raises:
        UserError: a number that cannot be, a model that does not exist, or bf16 at stage 0, which the engine
            refuses.
    """
    if arguments.steps < 1 or min(arguments.micro_batches) < 1 or arguments.accumulate < 1:
        raise UserError("--steps, --micro-batches and --accumulate: give 1 or more")
    if arguments.precision == "bf16" and "zero0" in arguments.stages:
        raise UserError("--stages zero0: the engine refuses bf16 there; name the others")
    machine = describe_machine()
    warn_if_busy(machine)
    result: dict[str, Any] = {
        "benchmark": "one-process",
        "machine": machine,
        "device": device_here().type,
        "versions": versions_of(("torch", "deepspeed")),
        "dtype": arguments.precision,
        "threads": torch.get_num_threads(),
        "settings": list(arguments.set),
        "dry_run": arguments.dry_run,
        "comparisons": [],
    }
    for micro_batch in [1] if arguments.dry_run else arguments.micro_batches:
        for stage in arguments.stages:
            line = compared(arguments, micro_batch, stage)
            result["comparisons"].append(line)
            print(
                f"{line['preset']}, {line['tokens_per_step']:,} tokens, {stage}: engine "
                f"{line['engine_ms']['median']:.1f} ms, bare {line['bare_ms']['median']:.1f} ms, ratio "
                f"{line['ratio']:.3f}, of CPU time {line['cpu_ratio']:.3f}",
                flush=True,
            )
            write_result(arguments.output, result)


def compared(arguments: argparse.Namespace, micro_batch: int, stage: str) -> dict[str, Any]:
    """Both loops in turns of one step."""
    device = device_here()
    loops, bare = loops_of(arguments, micro_batch, stage, device)
    times: dict[str, list[float]] = {name: [] for name in loops}
    cpu_times: dict[str, list[float]] = {name: [] for name in loops}
    warm_up, steps = (1, 2) if arguments.dry_run else (3, arguments.steps)
    for number in range(-warm_up, steps):
        for name in loops if number % 2 else reversed(loops):
            started = time.process_time()
            (took,) = timed_steps(loops[name], 1, device)
            if number >= 0:
                times[name].append(took)
                cpu_times[name].append(1e3 * (time.process_time() - started))
    if any(loop.skipped_steps() for loop in loops.values()):
        raise UserError(f"{stage}: steps were skipped, so these are not steps of training")
    del loops
    release()
    return {
        "preset": bare.preset,
        "layers": bare.config().model.num_layers,
        "deepspeed_config": stage,
        "micro_batch": micro_batch,
        "accumulate": bare.accumulate,
        "tokens_per_step": bare.tokens_per_step,
        "steps": steps,
        "engine_ms": spread(times["engine"]),
        "bare_ms": spread(times["bare"]),
        "ratio": ratio(times),
        "cpu_ratio": ratio(cpu_times),
        "all_steps_ms": {name: [round(value, 3) for value in values] for name, values in times.items()},
    }


def ratio(times: dict[str, list[float]]) -> float:
    """Of the medians of both loops."""
    return statistics.median(times["engine"]) / statistics.median(times["bare"])


def loops_of(
    arguments: argparse.Namespace, micro_batch: int, stage: str, device: torch.device
) -> tuple[dict[str, Loop], Contender]:
    """The engine at a stage and the bare loop, and what the latter runs."""
    dry = arguments.dry_run
    loops = {}
    for name in ("engine", "bare"):
        contender = Contender(
            preset="tiny/lpa" if dry else arguments.preset,
            loop=name,
            micro_batch=micro_batch,
            accumulate=arguments.accumulate,
            precision=arguments.precision,
            settings=(f"train.deepspeed_config={stage}", *arguments.set),
            layers=1 if dry else arguments.layers,
            sequence=16 if dry else arguments.sequence,
            dry=dry,
        )
        loops[name] = build_loop(contender, device)
    return loops, contender
