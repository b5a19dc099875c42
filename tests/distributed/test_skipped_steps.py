"""A gradient that is not finite on one process changes nothing anywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from distributed.test_checkpoint import config, step, weights_of
from support.world import groups_for

from megatron_lpa.config import RunConfig


def with_a_bad_step(run: RunConfig, value: float) -> tuple:
    """Steps 0 to 3, with one between 1 and 2 whose activations are not finite on the last rank."""
    from megatron_lpa.engine.build import build_engine

    groups = groups_for(run.parallel.tensor_parallel_size)
    engine = build_engine(run, groups)
    losses = [step(engine, 0), step(engine, 1)]
    before = weights_of(engine)
    if groups.rank == groups.world_size - 1:
        hook = engine.module.layers[0].register_forward_hook(lambda module, inputs, output: output * value)
    step(engine, 7)
    if groups.rank == groups.world_size - 1:
        hook.remove()
    after = weights_of(engine)
    skipped = engine.skipped_steps
    losses += [step(engine, 2), step(engine, 3)]
    weights = weights_of(engine)
    assert engine.skipped_steps == skipped
    engine.destroy()
    return skipped, before, after, losses, weights


def without_it(run: RunConfig) -> tuple:
    from megatron_lpa.engine.build import build_engine

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    losses = [step(engine, number) for number in range(4)]
    weights = weights_of(engine)
    engine.destroy()
    return losses, weights


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("processes", "tp_size", "zero", "precision"),
    [
        (1, 1, "zero0", "fp32"),
        (1, 1, "zero3", "bf16"),
        (1, 1, "zero2", "bf16_mixed"),
        (2, 2, "zero0", "fp32"),
        (2, 1, "zero3", "bf16_mixed"),
        (2, 1, "zero1", "bf16"),
        (2, 1, "zero1", "fp32"),
        (2, 2, "zero2", "fp32"),
        (4, 2, "zero2", "bf16"),
        (4, 2, "zero3", "bf16"),
        (2, 1, "zero3", "fp32"),
        (2, 1, "zero3_offload", "fp32"),
    ],
)
def test_the_step_is_skipped_on_all_ranks_and_training_goes_on_as_without_it(
    world, processes, tp_size, zero, precision, value
):
    run = config("s2_lpa", tp_size, zero, precision=precision)
    expected = world(processes).run(without_it, run)
    for result, (losses_without, weights_without) in zip(
        world(processes).run(with_a_bad_step, run, value), expected, strict=True
    ):
        skipped, before, after, losses, weights = result
        assert skipped == 1
        assert losses == losses_without
        for name, value_before in before.items():
            assert np.array_equal(value_before, after[name]), name
            assert np.array_equal(weights[name], weights_without[name]), name
