"""Finds the fastest path and tiles for each shape and writes them into a tuning table.

For every shape, forms q-k-v (three pairs, alone, and with a norm before and rotary embedding after) and o (one pair): separate products, joined
products, and the kernel with the candidate tiles that fit, forward and for the gradient of x each on its own.
A path enters the table only if it beats separate products by more than the margin; a case where none does is
written down as eager, so that the table shows what was measured. Cases of other shapes in the table stay.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_layers as layers
from benchmarks.kernel import Plans, checked_setting
from benchmarks.kernel_timing import Setting, describe, graph_median_us, median_us
from benchmarks.machine import usable_cores, write_result
from megatron_lpa.kernels.tiles import FEW_TOKENS, candidates, why_not
from megatron_lpa.ops.dispatch import Case, Plan, table_path, why_not_fused

HELP = "measure paths and tiles and write the tuning table"
MARGIN = 0.02
"""A path must be this much faster than separate products: times of equal code differ by about as much."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, to try the command without a GPU"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--budget-ms", type=float, default=50.0, metavar="N", help="device time per figure (default: 50)")  # fmt: skip
    parser.add_argument("--tiles", type=int, default=8, metavar="N", help="candidates per kernel and shape (default: 8)")  # fmt: skip
    parser.add_argument("--shapes", type=int, metavar="N", help="only the first N training shapes")
    parser.add_argument(
        "--shape", nargs=3, type=int, action="append", metavar=("TOKENS", "D", "R"), help="this shape instead; can be given again"
    )  # fmt: skip
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="table to extend (default: the shipped one of this device)")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Measures and writes the table after every case.

    Raises:
        UserError: there is no GPU and this is no dry run, or the table cannot be written.
    """
    setting = checked_setting(arguments.dry_run, arguments.budget_ms, arguments.dtype)
    shapes = [layers.Shape(*numbers) for numbers in arguments.shape or []]
    shapes = shapes or [*default_shapes(setting)[: arguments.shapes]]
    path = arguments.table
    if path is None and not setting.dry:
        path = table_path(torch.cuda.get_device_capability())
    if not setting.dry:
        compile_ahead(setting, shapes, arguments.tiles, min(8, usable_cores()), limit_s=600)
    lines: list[dict[str, Any]] = []
    for line in measured_lines(setting, shapes, arguments.tiles):
        lines.append(line)
        print(summary(line), flush=True)
        if path is not None:
            write_result(path, merged_table(path, lines, setting))


def default_shapes(setting: Setting) -> tuple[layers.Shape, ...]:
    """The paper's training shapes, then decoding sizes."""
    return (layers.DRY_PAPER + layers.DRY_DECODE) if setting.dry else layers.PAPER + layers.DECODE


def measured_lines(setting: Setting, shapes: list[layers.Shape], tiles: int) -> Iterator[dict[str, Any]]:
    """One line of the table per shape, form and pass; decoding has no backward pass."""
    for shape in shapes:
        for pairs, norm in ((3, False), (1, False), (3, True)):
            for training in (False,) if shape in layers.DECODE + layers.DRY_DECODE else (True, False):
                yield tune(setting, shape, pairs, norm, training, tiles)


def compile_ahead(setting: Setting, shapes: Sequence[layers.Shape], tiles: int, workers: int, limit_s: float) -> int:  # fmt: skip
    """Compiles what ``measured_lines`` will ask for in several processes, into Triton's cache on disk.

    Compiling one kernel after the other would take most of a tuning run. A kernel is compiled for a rank, a form
    and tiles, not for widths and tokens, so a few tokens do, and shapes of one rank share their kernels.

    Returns:
        how many kernels were asked for.
    """
    jobs: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for shape in shapes:
        for pairs, norm in ((3, False), (1, False), (3, True)):
            small = layers.Shape(min(256, shape.tokens), shape.width, shape.rank)
            for text in fitting(setting, shape, 1, tiles, norm):
                for training in (False, True):
                    jobs.setdefault(
                        (shape.rank, pairs, norm, text, training),
                        (setting, small, pairs, norm, training, Plan("fused", text)),
                    )
            for text in fitting(setting, shape, pairs, tiles):
                jobs.setdefault(
                    (shape.rank, pairs, norm, "", text),
                    (setting, small, pairs, norm, True, Plan("fused", "", text)),
                )
    if workers == 0:
        for job in jobs.values():
            compile_one(job)
        return len(jobs)
    # Spawned, because a forked process cannot use the GPU of its parent.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        wait([pool.submit(compile_one, job) for job in jobs.values()], timeout=limit_s)
        pool.shutdown(wait=False, cancel_futures=True)
    return len(jobs)


def compile_one(job: tuple[Any, ...]) -> None:
    """Runs one plan once. What fails here fails again when it is measured, and is recorded there."""
    setting, shape, pairs, norm, training, plan = job
    layer = layers.make_layer(shape, dataclasses.replace(setting, dry=True))  # one set of inputs
    inputs, chosen = layer.sets[0], layer.pairs[:pairs]
    with contextlib.suppress(Exception), torch.set_grad_enabled(training):
        z = layers.project_by_plan(plan, inputs.x, chosen, layer.around(norm))
        if training:
            torch.autograd.grad(z, [inputs.x], inputs.upstream[:pairs])


def tune(
    setting: Setting, shape: layers.Shape, pairs: int, norm: bool, training: bool, tiles: int
) -> dict[str, Any]:
    """The line for one case: every plan's median, and the plan that wins."""
    layer = layers.make_layer(shape, setting)
    case = Case(
        setting.dtype, shape.width, (shape.rank,) * pairs, (shape.width,) * pairs, norm, training, norm
    )
    timed = functools.partial(time_plan, setting, layer, pairs, norm, training)
    times: dict[Plan, float] = {}
    failures: dict[str, str] = {}

    def attempt(plan: Plan) -> float:
        if plan not in times:
            try:
                times[plan] = timed(plan)
            except Exception as error:  # a tile that a device refuses must not end the search
                failures[" ".join(plan)] = f"{type(error).__name__}: {error}"[:200]
                return float("inf")
        return times[plan]

    attempt(Plan("eager"))
    if pairs > 1:
        attempt(Plan("joined"))
    if not training:
        attempt(Plan("merged"))
    if why_not_fused(case, setting.device.type) is None:
        forward_tiles = fitting(setting, shape, 1, tiles, norm)
        best = min(forward_tiles, key=lambda tile: attempt(Plan("fused", tile)), default="")
        if training:
            for tile in fitting(setting, shape, pairs, tiles):
                attempt(Plan("fused", best, tile))
            best_backward = min((plan for plan in times if plan.backward_tile), key=times.__getitem__, default=None)  # fmt: skip
            if best_backward is not None:
                attempt(Plan("fused", "", best_backward.backward_tile))
    plan = min(times, key=times.__getitem__)
    eager = times[Plan("eager")]
    if times[plan] > (1 - MARGIN) * eager:
        plan = Plan("eager")
    return {
        "dtype": str(setting.dtype).removeprefix("torch."),
        "d_in": case.d_in, "ranks": list(case.ranks), "widths": list(case.widths), "norm": norm, "rotary": norm,
        "training": training, "tokens": shape.tokens,
        **{key: value for key, value in plan._asdict().items() if value},
        "median_us": {" ".join(filter(None, p)): round(t, 2) for p, t in sorted(times.items(), key=lambda item: item[1])},
        **({"failed": failures} if failures else {}),
    }  # fmt: skip


def fitting(setting: Setting, shape: layers.Shape, latents: int, count: int, rotary: bool = False) -> list[str]:  # fmt: skip
    """The first candidates that fit the device."""
    capability = torch.cuda.get_device_capability() if setting.device.type == "cuda" else (9, 0)
    size = setting.dtype.itemsize
    fits = [
        tile for tile in candidates(shape.tokens) if why_not(tile, shape.rank, latents, size, capability, rotary) is None
    ]  # fmt: skip
    return [str(tile) for tile in (fits[:1] if setting.dry else fits[:count])]


def time_plan(
    setting: Setting, layer: layers.Layer, pairs: int, norm: bool, training: bool, plan: Plan
) -> float:
    """Median of three measurements of one plan, forward or with backward; few tokens in a CUDA graph."""
    chosen, around = layer.pairs[:pairs], layer.around(norm)
    leaves = [t for pair in chosen for t in pair if t is not None] + ([layer.norm.weight] if norm else [])

    def call(number: int) -> Any:
        inputs = layer.sets[number]
        with torch.set_grad_enabled(training):
            z = layers.project_by_plan(plan, inputs.x, chosen, around)
            return torch.autograd.grad(z, [inputs.x, *leaves], inputs.upstream[:pairs]) if training else z

    repeats = 1 if setting.dry else 3
    measure = graph_median_us if layer.shape.tokens <= FEW_TOKENS and not training else median_us
    return statistics.median(measure(call, len(layer.sets), setting) for _ in range(repeats))


def merged_table(path: Path, lines: list[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """The table with new lines in place of old ones of the same case and number of tokens."""
    old = json.loads(path.read_text()) if path.is_file() else {"cases": []}
    fresh = {key(line) for line in lines}
    kept = [line for line in old["cases"] if key(line) not in fresh]
    about = describe(setting)
    major, minor = about["device"].get("capability", (0, 0))
    return {
        "device": f"sm_{major}{minor}",
        "status": "dry run" if setting.dry else "measured",
        "note": "Medians in microseconds of every plan tried; docs/kernels.md says how they are made and used.",
        "machine": about,
        "cases": sorted(kept + lines, key=lambda line: json.dumps(key(line))),
    }


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a line is about."""
    return (
        line["dtype"], line["d_in"], tuple(line["ranks"]), tuple(line["widths"]), line["norm"], line.get("rotary", False),
        line["training"], line["tokens"],
    )  # fmt: skip


def plans_of(lines: list[dict[str, Any]]) -> Plans:
    """The training plans, by shape, pairs and norm."""
    return {
        (
            layers.Shape(line["tokens"], line["d_in"], line["ranks"][0]),
            len(line["ranks"]),
            line["norm"],
        ): Plan(line["path"], line.get("forward_tile", ""), line.get("backward_tile", ""))
        for line in lines
        if line["training"]
    }


def summary(line: dict[str, Any]) -> str:
    times = line["median_us"]
    best = min(times.values())
    return (
        f"{line['tokens']} tokens, d {line['d_in']}, r {line['ranks'][0]}, {len(line['ranks'])} pairs"
        f"{', norm and rotary' if line['norm'] else ''}{', training' if line['training'] else ''}: {line['path']} "
        f"{line.get('forward_tile', '')} {line.get('backward_tile', '')} {best:.1f} us, eager {times['eager']:.1f} us"
    )
