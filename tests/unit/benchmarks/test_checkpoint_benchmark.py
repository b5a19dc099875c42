"""The checkpoint benchmark measures real checkpoints, and its table adds up."""

from __future__ import annotations

import json
from pathlib import Path

from support import forked

from benchmarks.checkpoint import table

TOOL = Path(__file__).parents[3] / "tools" / "benchmark.py"


def test_it_runs_and_records(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    words = ["checkpoint", "--preset", "tiny/lpa", "--layers", "1", "--repeat", "1"]
    done = forked.run([TOOL, *words, "--folder", tmp_path, "--output", output], TOOL.parents[1])
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    # fp32 master and two moments, and the weights in the run's precision; and headers.
    least = result["parameters"] * 12
    for kind in ("at_once", "beside"):
        assert least < result["kinds"][kind]["bytes"] < 1.6 * least
        assert 0 < result["kinds"][kind]["blocked_s"] <= result["kinds"][kind]["total_s"]
    assert result["layers"] == 1 and result["load_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]  # the checkpoints are gone


def test_the_table_counts_what_training_loses_of_half_an_hour() -> None:
    result = {
        "preset": "p", "layers": 2, "parameters": 3e6, "deepspeed_config": "zero3", "device": "cpu",
        "step_s": 0.5,
        "kinds": {
            "at_once": {"blocked_s": 9.0, "total_s": 9.0, "bytes": 18e9},
            "beside": {"blocked_s": 1.0, "slower_s": 0.8, "total_s": 12.0, "bytes": 18e9},
        },
        "load_s": 6.0,
    }  # fmt: skip
    _, _, at_once, beside, loading = table(result).splitlines()
    assert at_once.split()[-3:] == ["2.00", "0.50", "%"] and beside.split()[-3:] == ["1.50", "0.10", "%"]
    assert loading.endswith("3.00 GB/s")
