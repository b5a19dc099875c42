"""Low-dimensional projections of one attention layer (q, k, v, o), forward and with backward, in every way:

* separate: two matrix products per projection, as public code has it; also under torch.compile;
* joined: q, k and v share the first product and the gradient of x;
* fused: the two-product kernel with its default tiles;
* tuned: what --table or the shipped table says (auto);
* dense: one square matrix per projection (nn.Linear).

Each also with RMSNorm before and rotary embedding after. Decoding sizes run forward only, in a CUDA graph.
The bound is what a perfect kernel would take at the two ceilings, which are measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_layers as layers
from benchmarks.kernel_timing import (
    Ceilings,
    Setting,
    describe,
    graph_median_us,
    measure_ceilings,
    median_us,
    setting_of,
)
from benchmarks.machine import write_result
from megatron_lpa.errors import UserError
from megatron_lpa.ops.dispatch import EAGER, Case, Plan, why_not_fused

HELP = "low-dimensional projections of a layer: our paths against matrix products and dense layers"
REFERENCES = ("separate", "separate compiled", "dense", "dense compiled")

Plans = dict[tuple[layers.Shape, int, bool], Plan]
"""Tuned plans by shape, number of pairs, and whether there is a norm."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny shapes, to try the command; on a CPU where there is no GPU",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--budget-ms", type=float, default=150.0, metavar="N", help="device time per figure (default: 150)")  # fmt: skip
    parser.add_argument("--shapes", type=int, metavar="N", help="only the first N training shapes")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the result, after each shape")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table per shape, and records where asked.

    Raises:
        UserError: there is no GPU and this is no dry run.
    """
    setting = checked_setting(arguments.dry_run, arguments.budget_ms, arguments.dtype)
    ceilings = measure_ceilings(setting)
    result: dict[str, Any] = {"benchmark": "kernel", **describe(setting), "ceilings": vars(ceilings), "shapes": []}  # fmt: skip
    print(ceilings_line(ceilings))
    for record in records(setting, ceilings, {}, arguments.shapes):
        result["shapes"].append(record)
        print(table(record), flush=True)
        write_result(arguments.output, result)


def checked_setting(dry: bool, budget_ms: float, dtype: str = "bfloat16") -> Setting:
    """``setting_of``, refusing to measure a CPU.

    Raises:
        UserError: there is no GPU and this is no dry run.
    """
    setting = setting_of(dry, budget_ms, dtype)
    if setting.device.type != "cuda" and not dry:
        raise UserError("no GPU was found; --dry-run tries the command on the CPU")
    return setting


def records(
    setting: Setting, ceilings: Ceilings, plans: Plans, limit: int | None = None, compiled_shapes: int = 99
) -> Iterator[dict[str, Any]]:
    """One record per shape, decoding sizes after the first two training shapes.

    Args:
        setting: device, dtype, budget.
        ceilings: for the bounds.
        plans: tuned plans; without them ``tuned`` is what the shipped table says.
        limit: training shapes, the first ones.
        compiled_shapes: of these, how many with torch.compile, which takes minutes.
    """
    paper = (layers.DRY_PAPER if setting.dry else layers.PAPER)[:limit]
    decode = layers.DRY_DECODE if setting.dry else layers.DECODE
    for number, shape in enumerate(paper[:2]):
        yield training_record(shape, setting, ceilings, plans, number < compiled_shapes)
    for shape in decode:
        yield decode_record(shape, setting, ceilings)
    for number, shape in enumerate(paper[2:], start=2):
        yield training_record(shape, setting, ceilings, plans, number < compiled_shapes)


def variants(
    setting: Setting, shape: layers.Shape, plans: Plans, normed: bool
) -> dict[str, tuple[layers.Projections, bool]]:
    """Name, projections, and whether they are dense."""
    chosen: dict[str, tuple[layers.Projections, bool]] = {
        "separate": (layers.separate, False),
        "dense": (layers.dense, True),
        "joined": (layers.by_path("joined"), False),
    }
    case = Case(setting.dtype, shape.width, (shape.rank,), (shape.width,), normed, True, normed)
    if why_not_fused(case, setting.device.type) is None:
        chosen["fused"] = (layers.by_path("fused"), False)
    qkv, o = plans.get((shape, 3, normed)), plans.get((shape, 1, False))
    chosen["tuned"] = (
        (layers.by_path("auto"), False)
        if qkv is None and o is None
        else (layers.by_plan(qkv or EAGER, o or EAGER), False)
    )
    return chosen


def training_record(
    shape: layers.Shape, setting: Setting, ceilings: Ceilings, plans: Plans, with_compiled: bool
) -> dict[str, Any]:
    """Forward, and forward with backward, of every variant; under torch.compile where that can change something:
    matrix products alone it leaves as they are."""
    layer = layers.make_layer(shape, setting)
    size = torch.empty(0, dtype=setting.dtype).element_size()
    record: dict[str, Any] = {
        "kind": "training",
        **vars(shape),
        "bound_us": {
            "forward": layers.bound_us(shape, ceilings, size, training=False),
            "training": layers.bound_us(shape, ceilings, size, training=True),
        },
        "plain": {},
        "with_norm_and_rotary": {},
    }
    for key, normed in (("plain", False), ("with_norm_and_rotary", True)):
        for name, (project, is_dense) in variants(setting, shape, plans, normed).items():
            function = layers.layer_function(project, layer, is_dense, normed)
            record[key][name] = guarded(functools.partial(both_passes, function, layer, is_dense, normed, setting))  # fmt: skip
            if with_compiled and (name == "separate" or (normed and name != "fused")):
                torch.compiler.reset()
                compiled = torch.compile(function, backend=setting.compile_backend)
                record[key][f"{name} compiled"] = guarded(
                    functools.partial(both_passes, compiled, layer, is_dense, normed, setting)
                )
    return record


def both_passes(
    function: Callable[..., Any], layer: layers.Layer, is_dense: bool, normed: bool, setting: Setting
) -> dict[str, float]:
    """Forward alone, and forward with backward."""
    sets = len(layer.sets)
    return {
        "forward": median_us(layers.forward_call(function, layer), sets, setting),
        "training": median_us(layers.training_call(function, layer, is_dense, normed), sets, setting),
    }


def decode_record(shape: layers.Shape, setting: Setting, ceilings: Ceilings) -> dict[str, Any]:
    """Forward of every variant, captured in a graph, and launched one by one."""
    layer = layers.make_layer(shape, setting)
    size = torch.empty(0, dtype=setting.dtype).element_size()
    bound = layers.bound_us(shape, ceilings, size, training=False)
    record: dict[str, Any] = {"kind": "decode", **vars(shape), "bound_us": {"graph": bound, "launched": bound}, "plain": {}}  # fmt: skip
    for name, (project, is_dense) in variants(setting, shape, {}, False).items():
        call = layers.forward_call(layers.layer_function(project, layer, is_dense, False), layer)
        record["plain"][name] = guarded(
            lambda call=call: {
                "graph": graph_median_us(call, len(layer.sets), setting),
                "launched": median_us(call, len(layer.sets), setting),
            }
        )
    return record


def guarded(measure: Any) -> dict[str, Any]:
    """One variant that fails, for want of memory say, must not cost the others' figures."""
    try:
        return measure()
    except Exception as error:  # recorded, and shown in the table
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def ceilings_line(ceilings: Ceilings) -> str:
    return f"ceilings: {ceilings.flops / 1e12:.4g} TFLOP/s matrix product, {ceilings.bytes / 1e12:.4g} TB/s copy"  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Times, times against the best plain path (separate products, compiled or not), and share of the bound."""
    columns = list(record["bound_us"])
    lines = [f"{record['tokens']} tokens, d {record['width']}, r {record['rank']}"]
    for key in ("plain", "with_norm_and_rotary"):
        if key not in record:
            continue
        head = "".join(f"{c + ' us':>14}{'vs separate':>13}{'bound/time':>12}" for c in columns)
        lines.append(f"  {key.replace('_', ' '):<24}{head}")
        figures = record[key]
        best = {
            c: min(f[c] for n, f in figures.items() if n in REFERENCES[:2] and c in f)
            for c in columns
            if any(n in REFERENCES[:2] and c in f for n, f in figures.items())
        }
        for name, figure in figures.items():
            if "error" in figure:
                lines.append(f"  {name:<24}{figure['error'][:90]}")
                continue
            cells = "".join(
                f"{figure[c]:>14.1f}{best[c] / figure[c] if c in best else float('nan'):>12.2f}x"
                f"{record['bound_us'][c] / figure[c]:>12.0%}"
                for c in columns
            )
            lines.append(f"  {name:<24}{cells}")
    return "\n".join(lines)
