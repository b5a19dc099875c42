"""One data-parallel replica: plain PyTorch steps do what DeepSpeed does, the same at every ZeRO stage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from distributed.test_checkpoint import config, step, weights_of
from support.world import groups_for

from megatron_lpa.config import RunConfig
from megatron_lpa.engine.ds_config import SHIPPED


def trained(run: RunConfig) -> tuple[str, int, list[float], dict]:
    """Who steps, the stage that the layout names, losses of four steps of four micro-batches, final
    weights."""
    from megatron_lpa.checkpoint.saving import layout_of
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    losses = [step(engine, number) for number in range(4)]
    weights = {name: value.tobytes() for name, value in weights_of(engine).items()}
    found = type(engine.stepper).__name__, layout_of(EngineState(engine))["zero_stage"], losses, weights
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


def with_one_bad_replica(run: RunConfig, value: float) -> tuple[int, bool, float]:
    """A step in which the last rank alone has a bad gradient, of a parameter that every rank holds whole."""
    from megatron_lpa.engine.build import build_engine

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    step(engine, 0)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    if engine.groups.rank == engine.groups.world_size - 1:
        hook = engine.module.final_norm.weight.register_hook(lambda gradient: gradient * value)
    step(engine, 1)
    if engine.groups.rank == engine.groups.world_size - 1:
        hook.remove()
    unchanged = all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())
    ids = torch.ones(2, run.model.sequence_length + 1, dtype=torch.int64)
    norm = engine.train_step([ids] * engine.micro_steps, [0] * engine.micro_steps, 1e-3).grad_norm
    skipped = engine.skipped_steps
    engine.destroy()
    return skipped, unchanged, float(norm)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_bad_on_one_tensor_parallel_rank_alone_stops_the_step_on_all(world, value):
    results = world(2).run(with_one_bad_replica, config("s2_lpa", 2, "zero3"), value)
    assert [result[:2] for result in results] == [(1, True)] * 2
    assert results[0][2] == results[1][2]
