"""The benchmarks run through without a GPU, so that no minute on one is lost to a mistake in them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite, kernel, kernel_layers, kernel_tune
from benchmarks.kernel_cases import Job
from benchmarks.kernel_timing import Ceilings, Setting, Times
from benchmarks.suite_parts import Suite
from megatron_lpa.errors import UserError
from megatron_lpa.ops.dispatch import Plan, parse_table

ROOT = Path(__file__).resolve().parents[2]
MODULES = [kernel, kernel_tune, gpu_suite]
DRY = Setting(torch.device("cpu"), torch.float32, 1.0, True)


def arguments_of(module: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", MODULES)
def test_without_a_gpu_only_a_dry_run_starts(module: Any, tmp_path: Path) -> None:
    assert module.HELP
    with pytest.raises(UserError, match="no GPU was found; --dry-run"):
        module.run(arguments_of(module))


def test_the_suite_runs_every_part_and_its_table_is_one(tmp_path: Path) -> None:
    output, table = tmp_path / "suite.json", tmp_path / "table.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_suite",
        "--dry-run",
        "--output",
        output,
        "--table",
        table,
    ]
    has_triton = importlib.util.find_spec("triton") is not None
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if has_triton else {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert {name: part["status"] for name, part in result["parts"].items()} == dict.fromkeys(
        gpu_suite.BUDGETS_S, "done"
    ), done.stdout + done.stderr
    gate = result["tests"]["gate"]
    assert gate["exit_code"] == 0 and gate["passed"] and gate["counts"]["passed"] > 0
    assert not has_triton or result["compiled"]["done"] == result["compiled"]["kernels"] > 0
    assert result["table"] == str(table)
    assert result["ceilings"]["flops"] > 0 and result["ceilings"]["bytes"] > 0
    lines = result["tune"]
    assert not any("failed" in line for line in lines), lines
    assert any(name.startswith("fused") for line in lines for name in line["device_us"]) == has_triton
    assert all(
        line["device"] == "cpu" and line["device_us"].keys() == line["host_us"].keys() for line in lines
    )
    cases = parse_table(json.loads(table.read_text()), table, (9, 0), "cpu")
    assert sum(len(measured) for measured in cases.values()) == len(lines)
    variants = [v for r in result["kernel"] for v in (r["plain"] | r.get("with_norm_and_rotary", {})).items()]
    assert not [variant for variant in variants if "error" in variant[1]]
    assert all(figure["device_us"] > 0 for _, variant in variants for figure in variant.values())
    assert ("fused" in dict(variants)) == has_triton
    assert [record["kind"] for record in result["kernel"]] == ["training", "decode"]
    training = result["kernel"][0]
    compiled = {(key, f"{name} compiled") for chosen in kernel.COMPILED for key, name in chosen}
    assert all(name in training[key] for key, name in compiled)
    assert training["plain"]["joined"].keys() == {"forward", "training"}


def test_what_fails_or_has_no_time_is_recorded(tmp_path: Path) -> None:
    suite = Suite(DRY, tmp_path / "suite.json", total_s=60.0)

    def fail() -> None:
        raise RuntimeError("no luck")

    suite.part("first", fail, end_s=60.0)
    suite.part("second", fail, end_s=0.0)
    parts = json.loads((tmp_path / "suite.json").read_text())["parts"]
    assert parts["first"]["status"] == "failed" and "no luck" in parts["first"]["error"]
    assert parts["second"]["status"] == "no time left"


def test_tables_are_extended_not_replaced(tmp_path: Path) -> None:
    line = kernel_tune.tune(DRY, Job(kernel_layers.DRY_PAPER[0], 1, False, False), tiles=0)
    assert line is not None
    path = tmp_path / "table.json"
    path.write_text(json.dumps(kernel_tune.merged_table(path, [line, line | {"tokens": 5}], DRY)))
    again = kernel_tune.merged_table(path, [line | {"path": "joined"}], DRY)["cases"]
    assert sorted((case["tokens"], case["path"]) for case in again) == [(5, line["path"]), (18, "joined")]
    other = kernel_tune.merged_table(path, [line | {"device": "another card"}], DRY)["cases"]
    assert sorted((case["tokens"], case["device"]) for case in other) == [
        (5, "cpu"),
        (18, "another card"),
        (18, "cpu"),
    ]


def test_a_variant_that_fails_leaves_the_others() -> None:
    def fail() -> None:
        raise MemoryError("too large")

    assert kernel.guarded(fail) == {"error": "MemoryError: too large"}


@pytest.mark.parametrize(
    ("shape", "forward_us", "training_us"),
    [
        ((81920, 768, 128), 195, 623),
        ((81920, 768, 256), 326, 979),
        ((98304, 1024, 128), 305, 971),
        ((98304, 1024, 32), 287, 867),
        ((16384, 4096, 512), 696, 2088),
    ],
)
def test_bounds_by_hand(shape: tuple[int, int, int], forward_us: float, training_us: float) -> None:
    """790 TFLOP/s and 4.3 TB/s; where the products' weights weigh next to nothing."""
    ceilings = Ceilings(790e12, 4.3e12)
    bounds = [
        kernel_layers.bound_us(kernel_layers.Shape(*shape), ceilings, 2, training)
        for training in (False, True)
    ]
    assert bounds[1] == pytest.approx(training_us, rel=0.01)
    # By hand, forward was counted with the latents written; evaluation does not write them.
    assert 0.9 * forward_us <= bounds[0] <= 1.01 * forward_us


def test_rotation_is_the_models() -> None:
    from megatron_lpa.layers.sublayers import rope_tables
    from megatron_lpa.ops.elementwise import apply_rope

    cos, sin = rope_tables(7, 8, 10000.0, torch.device("cpu"))
    x = torch.randn(2, 7, 24)
    expected = apply_rope(x.unflatten(-1, (3, 8)).transpose(1, 2), cos, sin).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(kernel_layers.rotate(x, cos, sin), expected)


def test_variants_compute_the_same() -> None:
    layer = kernel_layers.make_layer(kernel_layers.DRY_PAPER[0], DRY)
    inputs = layer.sets[0]
    results = [
        kernel_layers.layer_function(project, layer, True)(inputs.x, inputs.y, inputs.pairs)
        for project in (
            kernel_layers.separate,
            kernel_layers.by_path("joined"),
            kernel_layers.by_path("auto"),
        )
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_time_is_looked_at_between_variants_and_what_is_not_compiled_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two shapes; each figure takes a second, and so many seconds are there."""
    shapes = (kernel_layers.DRY_PAPER[0], kernel_layers.Shape(18, 64, 8))
    monkeypatch.setattr(kernel_layers, "DRY_PAPER", shapes)
    left = 0
    done: list[str] = []

    def measure(function: Any, *rest: Any) -> dict[str, Any]:
        nonlocal left
        left -= 1
        done.append("compiled" if hasattr(function, "_torchdynamo_orig_callable") else "plain")
        return {}

    monkeypatch.setattr(kernel, "all_passes", measure)

    def with_seconds(seconds: int) -> list[dict[str, Any]]:
        nonlocal left
        left = seconds
        done.clear()
        return list(kernel.records(DRY, Ceilings(1e12, 1e12), {}, left_s=lambda: left))[-1]

    (record,) = with_seconds(3)
    assert list(record["plain"]) == ["separate", "dense", "joined"] and not record["with_norm_and_rotary"]
    variants = len(kernel.variants(DRY, shapes[0], {}, False))
    plain = 3 * 2 * variants  # two training shapes and a decoding size, with and without norm
    with_seconds(plain)
    assert done == ["plain"] * plain
    with_seconds(plain + 15)  # what the first compiled one may take: it is not begun
    assert done == ["plain"] * plain
    monkeypatch.setattr(kernel, "LONGEST_COMPILED_S", 0.0)
    first, *_ = with_seconds(plain + 2)
    assert done == ["plain"] * plain + ["compiled"] * 2
    assert "separate compiled" in first["with_norm_and_rotary"] and "separate compiled" in first["plain"]


def test_no_line_where_time_ran_out_before_every_plan_was_tried() -> None:
    jobs = [Job(kernel_layers.DRY_PAPER[0], 1, False, False)] * 3
    asked = 0

    def out_of_time() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4

    assert len(list(kernel_tune.measured_lines(DRY, jobs, 1))) == 3
    assert len(list(kernel_tune.measured_lines(DRY, jobs, 1, out_of_time))) < 3


def played(times: dict[str, list[float]]) -> Any:
    """``prepared`` for plans whose measurements are given, the last one for ever."""

    def prepared(setting: Setting, layer: Any, job: Job, plan: Plan) -> Any:
        rest = times[" ".join(filter(None, plan))]
        return lambda budget_ms: Times(rest.pop(0) if len(rest) > 1 else rest[0], 7.0)

    return prepared


@pytest.mark.parametrize(
    ("joined", "path"),
    [([90.0], "joined"), ([99.0], "eager"), ([80.0, 110.0], "eager"), ([80.0, 90.0, 110.0, 90.0], "joined")],
)
def test_the_median_of_further_rounds_decides(
    joined: list[float], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the device's time; a lucky first measurement does not count, nor a gain within the margin."""
    monkeypatch.setattr(kernel_tune, "prepared", played({"eager": [100.0], "joined": list(joined)}))
    monkeypatch.setattr(kernel_tune, "why_not_fused", lambda case, device: "not here")
    wet = Setting(DRY.device, DRY.dtype, 1.0, False)
    line = kernel_tune.tune(wet, Job(kernel_layers.Shape(600, 32, 8), 3, False, True), tiles=1)
    assert line is not None and line["path"] == path and line["host_us"] == {"joined": 7.0, "eager": 7.0}
    assert line["device_us"]["joined"] == sorted(joined[1:] or joined)[len(joined[1:]) // 2]
    assert f"{path} " in kernel_tune.summary(line) and "(host 7.0)" in kernel_tune.summary(line)


def test_both_baselines_are_shown_apart() -> None:
    figures = {
        "separate": {"forward": {"device_us": 100.0, "host_us": 30.0}},
        "separate compiled": {"forward": {"device_us": 80.0, "host_us": 20.0}},
        "tuned": {"forward": {"device_us": 40.0, "host_us": 10.0, "host_ahead": False}},
        "dense": {"error": "too large"},
    }
    record = {"tokens": 1, "width": 2, "rank": 3, "bound_us": {"forward": 20.0}, "plain": figures}
    head, *lines = kernel.table(record).splitlines()[1:]
    assert "vs separate " in head and head.rstrip().endswith("bound/time")
    assert (
        lines[2].split()[:6] == ["tuned", "40.0", "10.0", "2.50x", "2.00x", "50%"]
        and "host not ahead" in lines[2]
    )
    assert "too large" in lines[3]
    del figures["separate compiled"]
    assert kernel.table(record).splitlines()[3].split()[3:5] == ["2.50x", "-"]
