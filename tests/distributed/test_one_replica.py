"""One data-parallel replica: plain PyTorch steps do what DeepSpeed does, the same at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed.test_checkpoint import config, step, weights_of
from support.world import groups_for

from megatron_lpa.config import RunConfig
from megatron_lpa.engine.ds_config import SHIPPED


def trained(run: RunConfig) -> tuple[str, int, list[float], dict]:
    """Who steps, the stage that the layout names, losses of four steps of four micro-batches, final weights."""
    from megatron_lpa.engine.build import Engine
    from megatron_lpa.engine.checkpoint import layout_of

    engine = Engine(run, groups_for(run.parallel.tensor_parallel_size))
    losses = [step(engine, number) for number in range(4)]
    weights = {name: value.tobytes() for name, value in weights_of(engine).items()}
    found = type(engine.stepper).__name__, layout_of(engine)["zero_stage"], losses, weights
    engine.destroy()
    return found


def with_deepspeed(tmp_path: Path, stage: str) -> str:
    """The shipped knobs with DeepSpeed's timers, which only DeepSpeed has."""
    path = tmp_path / f"{stage}.json"
    path.write_text(
        json.dumps(json.loads((SHIPPED / f"{stage}.json").read_text()) | {"wall_clock_breakdown": True})
    )
    return str(path)


@pytest.mark.parametrize(("processes", "tp_size"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
def test_every_stage_takes_the_same_steps_and_they_are_deepspeeds(
    world, tmp_path, processes, tp_size, precision
):
    stages = ["zero1", "zero2", "zero3"] if precision == "bf16" else ["zero0", "zero1", "zero2", "zero3"]
    results = {}
    for stage in stages:
        name, asked, losses, weights = world(processes).run(
            trained, config("s2_lpa", tp_size, stage, precision=precision)
        )[0]
        assert (name, f"zero{asked}") == ("OneReplica", stage)
        results[stage] = losses, weights
    assert all(result == results["zero3"] for result in results.values())
    knobs = with_deepspeed(tmp_path, "zero3")
    name, _, losses, _ = world(processes).run(trained, config("s2_lpa", tp_size, knobs, precision=precision))[
        0
    ]
    assert name == "DeepSpeedStep"
    assert losses == pytest.approx(results["zero3"][0], rel=1e-6)
