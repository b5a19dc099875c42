"""ZeRO knobs come from files, everything else from the run."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lpa import files
from megatron_lpa.config import OptimConfig, RunConfig, TrainConfig
from megatron_lpa.engine.ds_config import (
    SHIPPED,
    build_ds_config,
    find_ds_config,
    needs_deepspeed,
    read_zero_knobs,
)
from megatron_lpa.errors import TryAgain, UserError

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
        ("{", "not valid JSON"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        (" " * (1 << 20) + "{}", "more than the"),
        ({"k" * 9000: 1}, "unknown key 'kkk"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}, "offload_optimizer is 'cpu'"),
        ({"zero_optimization": {"stage": 1, "offload_param": [1]}}, "offload_param is [1]"),
        ({"zero_optimization": {"stage": 1}, "aio": 5}, "aio is 5 but must be an object"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown is 'yes' but must be true or false"),
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
    assert len(str(caught.value)) < len(name) + 250 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"reduce_bucket_size": "big"}, "zero_optimization.reduce_bucket_size is 'big'"),
        ({"reduce_bucket_size": -5}, "greater than 0"),
        ({"x" * 5000: 1}, "zero_optimization.xxx"),
        ({"offload_optimizer": {"device": "gpu"}}, "zero_optimization.offload_optimizer.device is 'gpu'"),
    ],
)
def test_knobs_that_deepspeed_does_not_take_are_named(tmp_path, knobs, message):
    name = write(tmp_path, {"zero_optimization": {"stage": 1, **knobs}})
    with pytest.raises(UserError) as caught:
        build_ds_config(replace(RUN, train=replace(RUN.train, deepspeed_config=name)), dp_size=1)
    text = str(caught.value)
    assert name in text and message in text
    assert len(text) < len(name) + 350 and "\n" not in text


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "x/" * 4000, "zero1.json/x"])
def test_what_no_file_can_be_called_is_no_such_file(name):
    with pytest.raises(UserError, match="no such file") as caught:
        find_ds_config(name)
    assert len(str(caught.value)) < 300


def test_a_folder_of_the_name_does_not_hide_the_shipped_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero1").mkdir()
    assert find_ds_config("zero1") == SHIPPED / "zero1.json"


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: a named pipe"):
        read_zero_knobs(str(tmp_path / "pipe"), "fp32")


@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_disk_that_does_not_answer_is_no_missing_file(tmp_path, monkeypatch, call):
    name = write(tmp_path, {"zero_optimization": {"stage": 1}})
    real, refusals = getattr(os, call), []

    def faulty(path, *arguments, **keywords):
        if os.fspath(path) == name and (lasting or len(refusals) < 2):
            refusals.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(files, "PAUSES_S", (0, 0, 0))
    monkeypatch.setattr(os, call, faulty)
    lasting = False
    assert read_zero_knobs(name, "fp32")["zero_optimization"] == {"stage": 1}
    assert len(refusals) == 2
    lasting = True
    with pytest.raises(TryAgain, match=r"knobs\.json: cannot be read"):
        read_zero_knobs(name, "fp32")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"did you mean 'zero3'.*zero0, zero1, zero2, zero3, zero3_offload"):
        read_zero_knobs("zero33", "fp32")


def test_bf16_at_stage_0_is_refused_with_the_way_out():
    with pytest.raises(UserError, match="zero1"):
        read_zero_knobs("zero0", "bf16")


@pytest.mark.parametrize(
    ("knobs", "needed"),
    [
        ({}, False),
        ({"zero": {"reduce_bucket_size": 1000, "overlap_comm": True}}, False),
        ({"zero": {"offload_optimizer": {"device": "cpu"}}}, True),
        ({"zero": {"offload_optimizer": {"device": "none"}}}, False),
        ({"zero": {"offload_optimizer": {}}}, False),
        ({"zero": {"offload_param": {"device": "cpu"}}}, True),
        ({"zero": {"zero_quantized_weights": True}}, True),
        ({"zero": {"zero_quantized_weights": False}}, False),
        ({"wall_clock_breakdown": True}, True),
        ({"memory_breakdown": True}, True),
        ({"comms_logger": {"enabled": True}}, True),
        ({"comms_logger": {"enabled": False}}, False),
    ],
)
def test_what_only_deepspeed_does_is_left_to_it_with_one_replica_too(tmp_path, knobs, needed):
    content = {key: value for key, value in knobs.items() if key != "zero"}
    name = write(tmp_path, {"zero_optimization": {"stage": 3, **knobs.get("zero", {})}, **content})
    ds = build_ds_config(replace(RUN, train=replace(RUN.train, deepspeed_config=name)), dp_size=1)
    assert needs_deepspeed(ds) is needed


def test_mixed_precision_is_an_fp32_model_to_deepspeed_at_every_stage():
    for name in ("zero0", "zero1", "zero2", "zero3"):
        train = replace(RUN.train, precision="bf16_mixed", deepspeed_config=name)
        ds = build_ds_config(replace(RUN, train=train), 8)
        assert ds["bf16"] == {"enabled": False} and "torch_autocast" not in ds and "data_types" not in ds
