"""ZeRO knobs come from files, everything else from the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lpa.config import OptimConfig, RunConfig, TrainConfig
from megatron_lpa.engine.ds_config import SHIPPED, build_ds_config, read_zero_knobs
from megatron_lpa.errors import UserError

RUN = RunConfig(
    train=TrainConfig(steps=1, global_batch_size=96, micro_batch_size=4, precision="bf16"),
    optim=OptimConfig(grad_clip=0.7),
)


def write(tmp_path: Path, content: object) -> str:
    path = tmp_path / "knobs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_batch_precision_and_clipping_come_from_the_run():
    ds = build_ds_config(RUN, dp_size=8)
    assert ds["train_batch_size"] == 96
    assert ds["train_micro_batch_size_per_gpu"] == 4
    assert ds["gradient_accumulation_steps"] == 3
    assert ds["gradient_clipping"] == 0.7
    assert ds["bf16"] == {"enabled": True}
    assert ds["zero_optimization"]["stage"] == 3
    assert build_ds_config(replace(RUN, train=replace(RUN.train, precision="fp32")), 8)["bf16"] == {
        "enabled": False
    }


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_file_is_accepted(path):
    knobs = read_zero_knobs(path.stem, "fp32")
    assert str(knobs["zero_optimization"]["stage"]) in path.stem


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("train_batch_size", 8, "train.global_batch_size"),
        ("bf16", {"enabled": True}, "train.precision"),
        ("gradient_clipping", 1.0, "optim.grad_clip"),
        ("optimizer", {"type": "Adam"}, "the optim section"),
        ("gradient_accumulation_steps", 2, "train.micro_batch_size"),
    ],
)
def test_a_key_that_the_run_decides_is_refused(tmp_path, key, value, instead):
    name = write(tmp_path, {"zero_optimization": {"stage": 1}, key: value})
    with pytest.raises(UserError) as caught:
        read_zero_knobs(name, "fp32")
    assert name in str(caught.value) and repr(key) in str(caught.value) and instead in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ([1], "expected a JSON object"),
        ({}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 1}, "zero_optimisation": {}}, "unknown key 'zero_optimisation'"),
    ],
)
def test_malformed_files_are_named(tmp_path, content, message):
    name = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_zero_knobs(name, "fp32")
    assert name in str(caught.value) and message in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"did you mean 'zero3'.*zero0, zero1, zero2, zero3, zero3_offload"):
        read_zero_knobs("zero33", "fp32")


def test_bf16_at_stage_0_is_refused_with_the_way_out():
    with pytest.raises(UserError, match="zero1"):
        read_zero_knobs("zero0", "bf16")
