"""Low-dimensional projections of one attention layer (q, k, v, o), forward and with backward, in every way:

* separate: two matrix products per projection, as public code has it; also under torch.compile;
* joined: q, k and v share the first product and the gradient of x;
* fused: the two-product kernel with its default tiles;
* tuned: what this run's or the shipped table says (auto);
* dense: one square matrix per projection (nn.Linear).

Each also with RMSNorm before and rotary embedding after. Decoding sizes run forward only, in a CUDA graph,
with weights that are not in the L2 cache. Times are the device's, with the host ahead; what a call costs the
host stands beside. The bound is what a perfect kernel would take at the two ceilings, which are measured in
the same run.

All shapes come first without torch.compile, which takes many seconds per function; then again under it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_layers
from benchmarks.kernel_cases import decode_norms
from benchmarks.kernel_table import ceilings_line, table
from benchmarks.kernel_timing import (
    Ceilings,
    Setting,
    captured,
    describe,
    measure_ceilings,
    queued,
    setting_of,
)
from benchmarks.machine import write_result
from megatron_lpa.errors import UserError
from megatron_lpa.kernels.tiles import FEW_TOKENS
from megatron_lpa.ops.dispatch import (
    Case,
    Measured,
    Plan,
    default_tiles,
    planned,
    why_not_fused,
)

HELP = "low-dimensional projections of a layer: our paths against matrix products and dense layers"
FORMS = (("plain", False), ("with_norm_and_rotary", True))

COMPILED = (
    (("with_norm_and_rotary", "separate"), ("plain", "separate"), ("with_norm_and_rotary", "tuned")),
    (("with_norm_and_rotary", "dense"), ("with_norm_and_rotary", "joined")),
)
"""What is measured under torch.compile: the first of all shapes, then the second. Matrix products alone it
leaves as they are."""

Table = Mapping[Case, tuple[Measured, ...]]
"""A parsed tuning table."""

LONGEST_COMPILED_S = 15.0
"""What a compiled variant is thought to take before any was measured."""

Record = dict[str, Any]
LeftSeconds = Callable[[], float]


def endless() -> float:
    return float("inf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny shapes, to try the command; on a CPU where there is no GPU",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--budget-ms", type=float, default=150.0, metavar="N", help="time per figure (default: 150)"
    )
    parser.add_argument("--shapes", type=int, metavar="N", help="only the first N training shapes")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="where to record the result, after each shape"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table per shape, and records where asked.

    Raises:
        UserError: there is no GPU and this is no dry run.
    """
    setting = checked_setting(arguments.dry_run, arguments.budget_ms, arguments.dtype)
    ceilings = measure_ceilings(setting)
    result: dict[str, Any] = {"benchmark": "kernel", **describe(setting), "ceilings": vars(ceilings)}
    result["shapes"] = []
    print(ceilings_line(ceilings))
    for found in records(setting, ceilings, None, arguments.shapes):
        result["shapes"] = found
        write_result(arguments.output, result)
    for record in result["shapes"]:
        print(table(record))


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
    setting: Setting,
    ceilings: Ceilings,
    tuned: Table | None,
    limit: int | None = None,
    left_s: LeftSeconds = endless,
    known: Sequence[Record] = (),
    quick: bool = False,
) -> Iterator[list[Record]]:
    """One record per shape: all records so far, after each shape and each compiled variant that was measured.

    Args:
        setting: device, dtype, budget.
        ceilings: for the bounds.
        tuned: the table of ``tuned``; without one it is the shipped table.
        limit: training shapes, the first ones.
        left_s: seconds left. A compiled variant is begun only if there are as many as the longest one took.
        known: earlier records, which are filled where something is missing.
        quick: training shapes only, before tuning: without ``tuned``, and nothing compiled.
    """
    paper = (kernel_layers.DRY_PAPER if setting.dry else kernel_layers.PAPER)[:limit]
    decode = kernel_layers.DRY_DECODE if setting.dry else kernel_layers.DECODE
    shapes = paper if quick else (*paper[:2], *decode, *paper[2:])
    found = [record for record in known if shape_of(record) not in shapes]
    for shape in shapes:
        earlier = next((r for r in known if shape_of(r) == shape), None)
        record = earlier or empty_record(shape, setting, ceilings)
        measured = measure_shape(record, shape, setting, tuned, left_s, ("tuned",) if quick else ())
        if record["plain"]:
            found.append(record)
        if measured:
            yield found
    if quick:
        return
    longest = LONGEST_COMPILED_S
    for chosen in COMPILED:
        for record in (record for record in found if record["kind"] == "training"):
            pending = [(key, name) for key, name in chosen if f"{name} compiled" not in record[key]]
            if not pending:
                continue
            layer = kernel_layers.make_layer(shape_of(record), setting)
            for key, name in pending:
                if left_s() <= longest:
                    return
                start = time.monotonic()
                measure_compiled(record, layer, key, name, setting, tuned)
                longest = max(longest, time.monotonic() - start)
                yield found


def errors(records: Sequence[Record]) -> list[str]:
    """Variants that failed, each with its shape; running out of memory is a finding and no fault."""
    return [
        f"{record['tokens']} x {record['width']}, r {record['rank']}, {name}: {figures['error']}"
        for record in records
        for key, _ in FORMS
        for name, figures in record.get(key, {}).items()
        if "error" in figures and "OutOfMemoryError" not in figures["error"]
    ]


def shape_of(record: Record) -> kernel_layers.Shape:
    """The shape that a record is about."""
    return kernel_layers.Shape(record["tokens"], record["width"], record["rank"])


def empty_record(shape: kernel_layers.Shape, setting: Setting, ceilings: Ceilings) -> Record:
    """A record without figures."""
    few = shape.tokens <= FEW_TOKENS and shape not in kernel_layers.DRY_PAPER
    passes = (False,) if few else (False, True)
    bounds = {
        pass_name(training): kernel_layers.bound_us(shape, ceilings, setting.dtype.itemsize, training)
        for training in passes
    }
    norms = decode_norms(shape) if few else (False, True)
    return {
        "kind": "decode" if few else "training",
        **vars(shape),
        "bound_us": bounds,
        **{key: {} for key, normed in FORMS if normed in norms},
    }


def pass_name(training: bool) -> str:
    return "training" if training else "forward"


def variants(
    setting: Setting, shape: kernel_layers.Shape, tuned: Table | None, normed: bool
) -> dict[str, tuple[kernel_layers.Projections, bool]]:
    """Name, projections, and whether they are dense."""
    chosen: dict[str, tuple[kernel_layers.Projections, bool]] = {
        "separate": (kernel_layers.separate, False),
        "dense": (kernel_layers.dense, True),
        "joined": (kernel_layers.by_path("joined"), False),
        "tuned": (kernel_layers.by_path("auto"), False),
    }

    def cases(training: bool) -> list[Case]:
        """Of q, k, v and of o."""
        dtype, width, rank = setting.dtype, shape.width, shape.rank
        return [
            Case(dtype, width, (rank,) * pairs, (width,) * pairs, around, training, around)
            for pairs, around in ((3, normed), (1, False))
        ]

    if why_not_fused(cases(True)[0], setting.device.type) is None:
        index = 0 if setting.device.index is None else setting.device.index
        few = shape.tokens <= FEW_TOKENS
        with contextlib.suppress(UserError):  # no tile that could win fits this device
            qkv, o = [
                Plan("fused", *default_tiles((*case,), few, setting.device.type, index))
                for case in cases(True)
            ]
            chosen["fused"] = (kernel_layers.by_plans(qkv, o, qkv, o), False)
    if tuned is not None:
        plans = [
            planned(tuned.get(case, ()), case, shape.tokens)
            for training in (True, False)
            for case in cases(training)
        ]
        chosen["tuned"] = (kernel_layers.by_plans(*plans), False)
    return chosen


def measure_shape(
    record: Record,
    shape: kernel_layers.Shape,
    setting: Setting,
    tuned: Table | None,
    left_s: LeftSeconds,
    without: Sequence[str] = (),
) -> int:
    """Fills a record with every missing variant that is not compiled, as far as time allows, and says with
    how many."""
    pending = [
        (key, normed, name, *variant)
        for key, normed in FORMS
        if key in record
        for name, variant in variants(setting, shape, tuned, normed).items()
        if name not in record[key] and name not in without
    ]
    if not pending or left_s() <= 0:
        return 0
    layer = kernel_layers.make_layer(shape, setting)
    for done, (key, normed, name, project, is_dense) in enumerate(pending):
        if left_s() <= 0:
            return done
        function = kernel_layers.layer_function(project, layer, normed)
        record[key][name] = guarded(
            functools.partial(all_passes, function, layer, is_dense, normed, setting, record)
        )
    return len(pending)


def measure_compiled(
    record: Record, layer: kernel_layers.Layer, key: str, name: str, setting: Setting, tuned: Table | None
) -> None:
    """Adds one variant under torch.compile to a record."""
    normed = dict(FORMS)[key]
    project, is_dense = variants(setting, layer.shape, tuned, normed)[name]
    torch.compiler.reset()
    function = kernel_layers.layer_function(project, layer, normed)
    compiled = torch.compile(function, backend=setting.compile_backend)
    measure = functools.partial(all_passes, compiled, layer, is_dense, normed, setting, record)
    record[key][f"{name} compiled"] = guarded(measure)


def all_passes(
    function: Callable[..., Any],
    layer: kernel_layers.Layer,
    is_dense: bool,
    normed: bool,
    setting: Setting,
    record: Record,
) -> dict[str, dict[str, Any]]:
    """Forward alone, in a graph where tokens are few, and forward with backward where they are not."""
    sets = len(layer.sets)
    time_forward = captured if record["kind"] == "decode" else queued
    forward = kernel_layers.forward_call(function, layer, is_dense)
    figures = {"forward": time_forward(forward, sets, setting)(setting.budget_ms).record()}
    if "training" in record["bound_us"]:
        call = kernel_layers.training_call(function, layer, is_dense, normed)
        figures["training"] = queued(call, sets, setting)(setting.budget_ms).record()
    return figures


def guarded(measure: Any) -> dict[str, Any]:
    """One variant that fails, for want of memory say, must not cost the others' figures."""
    try:
        return measure()
    except Exception as error:  # recorded, and shown in the table
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
