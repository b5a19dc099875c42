"""What DeepSpeed and cuBLAS are told: nothing to wait for that could have come before, and sums in fp32."""

from __future__ import annotations

import json
import unittest.mock
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.world import groups_for

from megatron_lpa.config import OptimConfig, RunConfig, TrainConfig, load_config
from megatron_lpa.engine.ds_config import SHIPPED

SCALE = 32
"""Widths and vocabulary of the 3B models over this; matrices, and ZeRO's limits with them, over its
square."""


def scaled_run(preset: str, knobs: str) -> RunConfig:
    model = load_config(["--preset", preset]).model
    projections = {
        name: replace(spec, rank=spec.rank // SCALE) if spec.rank else spec
        for name, spec in vars(model.projections).items()
    }
    small = replace(
        model,
        vocab_size=model.vocab_size // SCALE,
        hidden_size=model.hidden_size // SCALE,
        ffn_hidden_size=model.ffn_hidden_size // SCALE,
        sequence_length=16,
        projections=replace(model.projections, **projections),
    )
    train = TrainConfig(
        steps=4, global_batch_size=4, micro_batch_size=2, precision="bf16", deepspeed_config=knobs
    )
    return RunConfig(model=small, optim=OptimConfig(warmup_steps=0), train=train)


def on_demand_and_device_waits(run: RunConfig) -> tuple[Counter[str], int]:
    """Of the fourth step: gathers that nothing had begun before they were needed, and waits for the whole
    device."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partitioned_param_profiler import PartitionedParameterProfiler

    from megatron_lpa.engine.build import build_engine

    engine = build_engine(run, groups_for(1))
    ids = torch.randint(run.model.vocab_size, (2, run.model.sequence_length + 1))

    def step() -> None:
        engine.train_step([ids] * engine.micro_steps, [0] * engine.micro_steps, 1e-3)

    for _ in range(3):  # DeepSpeed's trace of the modules, then its timer, which starts late
        step()
    events: Counter[str] = Counter()
    waits = []
    with (
        unittest.mock.patch.object(
            PartitionedParameterProfiler, "start_event", lambda _, name: events.update([name])
        ),
        unittest.mock.patch.object(PartitionedParameterProfiler, "stop_event", lambda *_: None),
        unittest.mock.patch.object(get_accelerator(), "synchronize", lambda *_: waits.append(1)),
    ):
        step()
    engine.destroy()
    return events, len(waits)


def scaled_knobs(tmp_path: Any, **changes: int) -> str:
    knobs = json.loads((SHIPPED / "zero3.json").read_text())
    zero = knobs["zero_optimization"] | changes
    for key in ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"):
        zero[key] //= SCALE**2
    zero["stage3_param_persistence_threshold"] = 5000 // SCALE  # what is kept is vectors, here as there
    path = tmp_path / "knobs.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


@pytest.mark.parametrize("preset", ["3b/transformer", "3b/lpa"])
def test_a_step_waits_for_no_layer_that_could_have_been_fetched_ahead(world, tmp_path, preset):
    run = scaled_run(preset, scaled_knobs(tmp_path))
    events, device_waits = world(2).run(on_demand_and_device_waits, run)[0]
    assert events["forward_prefetch_submit"] > 0 and events["backward_prefetch_submit"] > 0
    assert events["forward_fetch_submit"] == events["backward_fetch_submit"] == 0
    assert device_waits == 0


def test_limits_smaller_than_a_layer_would_show(world, tmp_path):
    knobs = scaled_knobs(tmp_path, stage3_prefetch_bucket_size=100_000_000)
    events, _ = world(2).run(on_demand_and_device_waits, scaled_run("3b/transformer", knobs))[0]
    assert events["forward_fetch_submit"] > 10


def reduced_precision_sums() -> tuple[bool, bool]:
    matmul = torch.backends.cuda.matmul
    return bool(matmul.allow_bf16_reduced_precision_reduction), bool(
        matmul.allow_fp16_reduced_precision_reduction
    )


def test_products_on_a_gpu_keep_their_partial_sums_in_fp32(world):
    assert world(1).run(reduced_precision_sums)[0] == (False, False)
