"""Finds the fastest path and tiles for each case and writes them into a tuning table.

For every case (``benchmarks/kernel_cases.py``): separate products, joined products, and the kernel with the
candidate tiles that fit, forward and for the gradient of x each on its own. All are timed once, then the
fastest few and separate products again, in turns. A path enters the table only if it beats separate products
by more than the margin; a case where none does is written down as eager, so that the table shows what was
measured. Cases of other shapes and of other devices stay.

What decides is the device's time with the host ahead, which is what a large model's step pays. The host's
time to launch each plan stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_layers
from benchmarks.kernel import checked_setting
from benchmarks.kernel_cases import Job, default_jobs, jobs_of
from benchmarks.kernel_compile import compile_ahead, fitting
from benchmarks.kernel_timing import Measure, Setting, Times, captured, describe, device_name, queued
from benchmarks.machine import usable_cores, write_result
from megatron_lpa.kernels.tiles import FEW_TOKENS
from megatron_lpa.ops.dispatch import Case, Plan, table_path, why_not_fused

HELP = "measure paths and tiles and write the tuning table"
MARGIN = 0.02
"""A path must be this much faster than separate products: times of equal code differ by about as much."""

FINALISTS = 3
"""Plans that are timed again."""

FINAL_ROUNDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, to try the command without a GPU"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--budget-ms", type=float, default=50.0, metavar="N", help="time per figure (default: 50)"
    )
    parser.add_argument(
        "--tiles", type=int, default=8, metavar="N", help="candidates per kernel and shape (default: 8)"
    )
    parser.add_argument("--cases", type=int, metavar="N", help="only the first N cases")
    parser.add_argument(
        "--shape",
        nargs=3,
        type=int,
        action="append",
        metavar=("TOKENS", "D", "R"),
        help="this shape instead; can be given again",
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE.json",
        help="table to extend (default: the shipped one of this device)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures and writes the table after every case.

    Raises:
        UserError: there is no GPU and this is no dry run, or the table cannot be written.
    """
    setting = checked_setting(arguments.dry_run, arguments.budget_ms, arguments.dtype)
    shapes = [kernel_layers.Shape(*numbers) for numbers in arguments.shape or []]
    jobs = [job for shape in shapes for training in (True, False) for job in jobs_of(shape, training)]
    jobs = (jobs or default_jobs(setting))[: arguments.cases]
    path = arguments.table
    if path is None and not setting.dry:
        path = table_path(torch.cuda.get_device_capability())
    if not setting.dry:
        compile_ahead(setting, jobs, arguments.tiles, workers(), limit_s=600)
    lines: list[dict[str, Any]] = []
    for line in measured_lines(setting, jobs, arguments.tiles):
        lines.append(line)
        print(summary(line), flush=True)
        if path is not None:
            write_result(path, merged_table(path, lines, setting))


def workers() -> int:
    """Processes that compile: two cores are left to this one and to the system."""
    return max(1, min(16, usable_cores() - 2))


def never() -> bool:
    return False


def measured_lines(
    setting: Setting, jobs: Sequence[Job], tiles: int, out_of_time: Callable[[], bool] = never
) -> Iterator[dict[str, Any]]:
    """One line of the table per job; a job during which time runs out has none, since not all was tried."""
    for job in jobs:
        line = tune(setting, job, tiles, out_of_time)
        if line is None:
            return
        yield line


def tune(
    setting: Setting, job: Job, tiles: int, out_of_time: Callable[[], bool] = never
) -> dict[str, Any] | None:
    """The line for one case: every plan's times, and the plan that wins; None if time ran out."""
    layer = kernel_layers.make_layer(job.shape, setting)
    measures: dict[Plan, Measure] = {}
    times: dict[Plan, Times] = {}
    failures: dict[str, str] = {}

    def attempt(plan: Plan) -> float:
        if plan not in times and not out_of_time():
            try:
                measures[plan] = prepared(setting, layer, job, plan)
                times[plan] = measures[plan](setting.budget_ms / 4)
            except Exception as error:  # a tile that a device refuses must not end the search
                failures[" ".join(plan)] = f"{type(error).__name__}: {error}"[:200]
        return times[plan].device_us if plan in times else float("inf")

    search(setting, job, tiles, attempt)
    eager = Plan("eager")
    if out_of_time() or eager not in times:
        return None
    finalists = dict.fromkeys([*sorted(times, key=lambda plan: times[plan].device_us)[:FINALISTS], eager])
    rounds: dict[Plan, list[Times]] = {plan: [] for plan in finalists}
    for _ in range(1 if setting.dry else FINAL_ROUNDS):
        for plan in finalists:  # in turns, so that a drift of the device's clock hits all alike
            rounds[plan].append(measures[plan](setting.budget_ms / 2))
    times |= {plan: middle(found) for plan, found in rounds.items()}
    best = min(finalists, key=lambda plan: times[plan].device_us)
    if times[best].device_us > (1 - MARGIN) * times[eager].device_us:
        best = eager
    return line_of(setting, job, best, times, failures)


def search(setting: Setting, job: Job, tiles: int, attempt: Callable[[Plan], float]) -> None:
    """Calls ``attempt`` with every plan worth trying: the backward tiles with the best forward tile."""
    attempt(Plan("eager"))
    if job.pairs > 1:
        attempt(Plan("joined"))
    if why_not_fused(case_of(setting, job), setting.device.type) is not None:
        return
    forward = {tile: attempt(Plan("fused", tile)) for tile in fitting(setting, job.shape, 1, tiles, job.norm)}
    best = min(forward, key=lambda tile: forward[tile], default="")
    if not job.training:
        return
    backward = {
        tile: attempt(Plan("fused", best, tile)) for tile in fitting(setting, job.shape, job.pairs, tiles)
    }
    if backward and best:
        attempt(Plan("fused", "", min(backward, key=lambda tile: backward[tile])))


def prepared(setting: Setting, layer: kernel_layers.Layer, job: Job, plan: Plan) -> Measure:
    """One plan, warmed up: forward or with backward; few tokens without backward in a CUDA graph."""
    around = layer.around(job.norm)

    def call(number: int) -> Any:
        inputs = layer.sets[number]
        chosen = inputs.pairs[: job.pairs]
        with torch.set_grad_enabled(job.training):
            z = kernel_layers.project_by_plan(plan, inputs.x, chosen, around)
            if not job.training:
                return z
            leaves = [t for pair in chosen for t in pair if t is not None]
            leaves += [layer.norm.weight] if job.norm else []
            return torch.autograd.grad(z, [inputs.x, *leaves], inputs.upstream[: job.pairs])

    few = job.shape.tokens <= FEW_TOKENS and not job.training
    return (captured if few else queued)(call, len(layer.sets), setting)


def middle(found: Sequence[Times]) -> Times:
    """Medians over rounds."""
    return Times(
        statistics.median(times.device_us for times in found),
        statistics.median(times.host_us for times in found),
        all(times.host_ahead for times in found),
    )


def case_of(setting: Setting, job: Job) -> Case:
    """What the model asks the table for."""
    width = job.shape.width
    return Case(
        setting.dtype,
        width,
        (job.shape.rank,) * job.pairs,
        (width,) * job.pairs,
        job.norm,
        job.training,
        job.norm,
    )


def line_of(
    setting: Setting, job: Job, plan: Plan, times: dict[Plan, Times], failures: dict[str, str]
) -> dict[str, Any]:
    """A line of the table."""
    names = {
        " ".join(filter(None, p)): t for p, t in sorted(times.items(), key=lambda item: item[1].device_us)
    }
    late = [name for name, t in names.items() if not t.host_ahead]
    return {
        **about(setting, job),
        **{key: value for key, value in plan._asdict().items() if value},
        "device_us": {name: round(t.device_us, 2) for name, t in names.items()},
        "host_us": {name: round(t.host_us, 2) for name, t in names.items()},
        **({"host_not_ahead": late} if late else {}),
        **({"failed": failures} if failures else {}),
    }  # fmt: skip


def about(setting: Setting, job: Job) -> dict[str, Any]:
    """What a line is about, as it stands in a table."""
    case = case_of(setting, job)
    return {
        "device": device_name(setting),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "d_in": case.d_in,
        "ranks": list(case.ranks),
        "widths": list(case.widths),
        "norm": case.norm,
        "rotary": case.rotary,
        "training": case.training,
        "tokens": job.shape.tokens,
    }


def unmeasured(setting: Setting, jobs: Sequence[Job], known: Sequence[dict[str, Any]]) -> list[Job]:
    """The jobs that no known line is about."""
    done = {key(line) for line in known}
    return [job for job in jobs if key(about(setting, job)) not in done]


def merged_table(path: Path, lines: list[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """The table with new lines in place of old ones of the same case and number of tokens."""
    old = json.loads(path.read_text()) if path.is_file() else {"cases": []}
    fresh = {key(line) for line in lines}
    kept = [line for line in old["cases"] if key(line) not in fresh]
    machine = describe(setting)
    major, minor = machine["device"].get("capability", (0, 0))
    return {
        "device": f"sm_{major}{minor}",
        "status": "dry run" if setting.dry else "measured",
        "note": "Medians in microseconds of every plan tried, of the device and of the host; "
        "docs/kernels.md says how they are made and used.",
        "machine": machine,
        "cases": sorted(kept + lines, key=lambda line: json.dumps(key(line))),
    }


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a line is about."""
    return (
        line.get("device", ""), line["dtype"], line["d_in"], tuple(line["ranks"]), tuple(line["widths"]),
        line["norm"], line.get("rotary", False), line["training"], line["tokens"],
    )  # fmt: skip


def summary(line: dict[str, Any]) -> str:
    times, host = line["device_us"], line["host_us"]
    chosen = " ".join(line[name] for name in ("path", "forward_tile", "backward_tile") if name in line)
    return (
        f"{line['tokens']} tokens, d {line['d_in']}, r {line['ranks'][0]}, {len(line['ranks'])} pairs"
        f"{', norm and rotary' if line['norm'] else ''}{', training' if line['training'] else ''}: {chosen} "
        f"{times[chosen]:.1f} us (host {host[chosen]:.1f}), "
        f"eager {times['eager']:.1f} us (host {host['eager']:.1f})"
    )
