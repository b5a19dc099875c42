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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not an installed package

from benchmarks import gpu_suite, kernel, kernel_layers, kernel_tune  # noqa: E402
from benchmarks.kernel_timing import Ceilings, Setting  # noqa: E402
from megatron_lpa.errors import UserError  # noqa: E402
from megatron_lpa.ops.dispatch import parse_table  # noqa: E402

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
        gpu_suite.SHARES, "done"
    ), done.stdout + done.stderr
    assert result["tests"]["exit_code"] == 0 and result["tests"]["counts"]["passed"] > 0
    assert result.get("compiled", 0) > 0 or not has_triton
    assert result["ceilings"]["flops"] > 0 and result["ceilings"]["bytes"] > 0
    lines = result["tune"]
    assert not any("failed" in line for line in lines), lines
    assert any(name.startswith("fused") for line in lines for name in line["median_us"]) == has_triton
    cases = parse_table(json.loads(table.read_text()), table, (9, 0))
    assert sum(len(measured) for measured in cases.values()) == len(lines)
    variants = [v for r in result["kernel"] for v in (r["plain"] | r.get("with_norm_and_rotary", {})).items()]
    assert not [variant for variant in variants if "error" in variant[1]]
    assert ("fused" in dict(variants)) == has_triton
    assert {record["kind"] for record in result["kernel"]} == {"training", "decode"}


def test_what_fails_or_has_no_time_is_recorded(tmp_path: Path) -> None:
    suite = gpu_suite.Suite(DRY, tmp_path / "suite.json", deadline=float("inf"), total_s=1.0)

    def fail() -> None:
        raise RuntimeError("no luck")

    suite.part("first", fail)
    suite.deadline = 0.0
    suite.part("second", fail)
    parts = json.loads((tmp_path / "suite.json").read_text())["parts"]
    assert parts["first"]["status"] == "failed" and "no luck" in parts["first"]["error"]
    assert parts["second"]["status"] == "no time left"


def test_tables_are_extended_not_replaced(tmp_path: Path) -> None:
    (line,) = [
        kernel_tune.tune(DRY, kernel_layers.DRY_PAPER[0], pairs, False, False, tiles=0) for pairs in (1,)
    ]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(kernel_tune.merged_table(path, [line, line | {"tokens": 5}], DRY)))
    again = kernel_tune.merged_table(path, [line | {"path": "joined"}], DRY)["cases"]
    assert sorted((case["tokens"], case["path"]) for case in again) == [(5, line["path"]), (18, "joined")]


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
    from megatron_lpa.layers.attention import rope_tables
    from megatron_lpa.ops.elementwise import apply_rope

    cos, sin = rope_tables(7, 8, 10000.0, torch.device("cpu"))
    x = torch.randn(2, 7, 24)
    expected = apply_rope(x.unflatten(-1, (3, 8)).transpose(1, 2), cos, sin).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(kernel_layers.rotate(x, cos, sin), expected)


def test_variants_compute_the_same() -> None:
    layer = kernel_layers.make_layer(kernel_layers.DRY_PAPER[0], DRY)
    inputs = layer.sets[0]
    results = [
        kernel_layers.layer_function(project, layer, False, True)(inputs.x, inputs.y)
        for project in (
            kernel_layers.separate,
            kernel_layers.by_path("joined"),
            kernel_layers.by_path("auto"),
        )
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)
