"""Saving and resuming in the same layout, and what is refused."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.models import MODELS
from support.world import groups_for

from megatron_lpa.checkpoint.manifest import complete_checkpoints, read_manifest
from megatron_lpa.checkpoint.progress import Progress, SampleOrder
from megatron_lpa.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_lpa.errors import UserError
from megatron_lpa.run_folder import MANIFEST

BATCH = 8
ORDER = SampleOrder(seed=27, samples_per_epoch=1000, samples_per_step=8)


def config(
    name: str, tp_size: int, zero: str, layout: str = "column_row", precision: str = "fp32"
) -> RunConfig:
    return RunConfig(
        model=MODELS[name],
        parallel=ParallelConfig(tp_size, layout),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        train=TrainConfig(
            steps=6, global_batch_size=BATCH, micro_batch_size=2, precision=precision, deepspeed_config=zero
        ),
    )


def step(engine, number: int) -> float:
    model: ModelConfig = engine.config.model
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(model.vocab_size, (BATCH, model.sequence_length + 1), generator=generator)
    share = BATCH // engine.groups.dp_size
    own = ids[engine.groups.dp_rank * share :][:share]
    result = engine.train_step(list(own.split(2)), [number * BATCH] * engine.micro_steps, 1e-2 / (1 + number))
    return float(engine.mean_over_replicas(result.loss))


def weights_of(engine) -> dict[str, np.ndarray]:
    from megatron_lpa.engine.engine_state import EngineState

    named = dict(EngineState(engine).gathered_weights())
    return {name: value.float().numpy() for name, value in named.items() if value is not None}


def undisturbed_and_resumed(run: RunConfig, folder: str) -> tuple:
    """Six steps in one go; and three, a checkpoint, a new engine, three more."""
    from megatron_lpa.checkpoint.resume import load_checkpoint
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    groups = groups_for(run.parallel.tensor_parallel_size)
    engine = build_engine(run, groups)
    losses = [step(engine, n) for n in range(3)]
    path = begin_save(EngineState(engine), Path(folder), Progress(3, 3 * BATCH, 99), ORDER).complete()
    losses += [step(engine, n) for n in range(3, 6)]
    weights = weights_of(engine)
    engine.destroy()

    other = replace(run, train=replace(run.train, seed=run.train.seed + 1))  # other initial weights
    resumed = build_engine(other, groups)
    progress = load_checkpoint(EngineState(resumed), path, ORDER).progress
    resumed_losses = [step(resumed, n) for n in range(3, 6)]
    resumed_weights = weights_of(resumed)
    resumed.destroy()
    return losses[3:], resumed_losses, weights, resumed_weights, progress


@pytest.mark.parametrize(
    ("processes", "name", "tp_size", "zero", "precision"),
    [
        (1, "s1_lpa", 1, "zero0", "fp32"),
        (2, "s1_lpa", 2, "zero0", "fp32"),
        (2, "s2_low_all", 1, "zero1", "bf16"),
        (2, "s2_low_all", 2, "zero2", "fp32"),
        (4, "s1_low_all", 2, "zero3", "fp32"),
        (4, "s2_lpa", 2, "zero3", "bf16"),
        (2, "s2_lpa", 1, "zero3_offload", "fp32"),
        (4, "tied_gelu_padded", 4, "zero3", "fp32"),
    ],
)
def test_resuming_is_bitwise_equal_to_never_having_stopped(
    world, tmp_path, processes, name, tp_size, zero, precision
):
    run = config(name, tp_size, zero, precision=precision)
    for result in world(processes).run(undisturbed_and_resumed, run, str(tmp_path)):
        losses, resumed_losses, weights, resumed_weights, progress = result
        assert resumed_losses == losses
        assert weights.keys() == resumed_weights.keys()
        for key, expected in weights.items():
            assert np.array_equal(resumed_weights[key], expected), key
        assert progress == Progress(3, 3 * BATCH, 99)


def save_only(run: RunConfig, folder: str, steps: int, keep: int = 0, shard_bytes: int | None = None) -> dict:
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.checkpoint.store import Retention
    from megatron_lpa.checkpoint.tensor_file import write_weights
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    for number in range(steps):
        step(engine, number)
        begin_save(EngineState(engine), Path(folder), Progress(number + 1), ORDER, Retention(keep)).complete()
    named = weights_of(engine)
    if shard_bytes is not None:
        write_weights(EngineState(engine).gathered_weights(), Path(folder) / "sharded", shard_bytes)
    engine.destroy()
    return named


def load_into(run: RunConfig, checkpoint: str, order: SampleOrder) -> str:
    """The message with which loading fails on this rank."""
    from megatron_lpa.checkpoint.resume import load_checkpoint
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    try:
        load_checkpoint(EngineState(engine), Path(checkpoint), order)
    except UserError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory) -> tuple[Path, RunConfig, dict]:
    folder = tmp_path_factory.mktemp("saved")
    run = config("s1_low_all", 2, "zero3")
    results = world(2).run(save_only, run, str(folder), 1, 0, 20_000)
    return folder, run, results[0]


def test_exported_weights_are_the_unsharded_ones_in_one_file_or_several(saved):
    from megatron_lpa.checkpoint.weights import load_decoder

    folder, run, expected = saved
    (checkpoint,) = complete_checkpoints(folder)
    stored = load_file(checkpoint / "weights" / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(stored[name].numpy(), value), name
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    decoder = load_decoder(folder / "sharded", run.model)
    for name, parameter in decoder.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), expected[name]), name


def test_manifest_describes_every_file_and_nothing_else_is_there(saved):
    folder, run, _ = saved
    (checkpoint,) = complete_checkpoints(folder)
    manifest = read_manifest(checkpoint)
    there = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert there == set(manifest["files"]) | {MANIFEST}
    assert manifest["progress"] == Progress(1)
    assert manifest["model"] == asdict(run.model)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda run: replace(run, model=replace(run.model, dropout=0.5)), "model.dropout was 0.0, is 0.5"),
        (
            lambda run: replace(run, model=replace(run.model, pad_vocab_to_multiple_of=4, vocab_size=61)),
            "model.vocab_size was 64, is 61",
        ),
    ],
)
def test_another_model_is_refused_on_every_rank(world, saved, change, expected):
    folder, run, _ = saved
    (checkpoint,) = complete_checkpoints(folder)
    for message in world(2).run(load_into, change(run), str(checkpoint), ORDER):
        assert expected in message
        assert str(checkpoint) in message


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (SampleOrder(28, 1000, 8), "order.seed was 27, is 28"),
        (SampleOrder(27, 999, 8), "samples_per_epoch was 1000, is 999"),
        (SampleOrder(27, 1000, 16), "samples_per_step was 8, is 16"),
    ],
)
def test_another_order_of_samples_is_refused_on_every_rank(world, saved, order, expected):
    folder, run, _ = saved
    (checkpoint,) = complete_checkpoints(folder)
    for message in world(2).run(load_into, run, str(checkpoint), order):
        assert expected in message


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "manifest"])
def test_a_damaged_checkpoint_is_refused_on_every_rank(world, saved, tmp_path, damage):
    folder, run, _ = saved
    checkpoint = tmp_path / "step_00000001"
    shutil.copytree(complete_checkpoints(folder)[0], checkpoint)
    victim = sorted((checkpoint / "state").iterdir())[0]
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "missing":
        victim.unlink()
    elif damage == "flipped":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    else:
        victim = checkpoint / MANIFEST
        victim.write_text(json.dumps({"format": 1}))
    for message in world(2).run(load_into, run, str(checkpoint), ORDER):
        assert str(victim) in message
        assert "delete" in message


def save_without_space(run: RunConfig, folder: str, failing_rank: int, limit_bytes: int) -> str:
    """Save a second checkpoint while one rank cannot write more than ``limit_bytes`` into a file."""
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    groups = groups_for(run.parallel.tensor_parallel_size)
    engine = build_engine(run, groups)
    begin_save(EngineState(engine), Path(folder), Progress(1), ORDER).complete()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if groups.rank == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        begin_save(EngineState(engine), Path(folder), Progress(2), ORDER).complete()
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
        engine.destroy()
    return ""


@pytest.mark.parametrize(
    ("failing_rank", "limit_bytes"),
    # Rank 0 writes nothing at all; or only the weights file is too large for it; or rank 1 fails alone.
    [(0, 0), (0, 30_000), (1, 0)],
)
def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_nothing_behind(
    world, tmp_path, failing_rank, limit_bytes
):
    run = config("s1_low_all", 2, "zero3")
    for message in world(2).run(save_without_space, run, str(tmp_path), failing_rank, limit_bytes):
        assert "could not be written" in message
        assert "free disk space" in message
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    read_manifest(tmp_path / "step_00000001")


def test_only_the_newest_checkpoints_are_kept(world, tmp_path):
    world(2).run(save_only, config("s1_lpa", 1, "zero1"), str(tmp_path), 4, 2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def resumed_with_other_settings(run: RunConfig, folder: str) -> tuple[list[float], list[float]]:
    """Two steps, a checkpoint, and two more steps with another optimizer section: losses and norms."""
    from megatron_lpa.checkpoint.resume import load_checkpoint
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    groups = groups_for(run.parallel.tensor_parallel_size)
    engine = build_engine(run, groups)
    for number in range(2):
        step(engine, number)
    path = begin_save(EngineState(engine), Path(folder), Progress(2), ORDER).complete()
    engine.destroy()
    changed = replace(run.optim, weight_decay=2.0, beta1=0.5, beta2=0.6, eps=1e-3, grad_clip=0.05)
    resumed = build_engine(replace(run, optim=changed), groups)
    load_checkpoint(EngineState(resumed), path, ORDER)
    losses = [step(resumed, number) for number in range(2, 5)]
    weights = weights_of(resumed)
    resumed.destroy()
    return losses, [float(np.abs(value).sum()) for value in weights.values()]


def test_changed_optimizer_settings_act_after_resuming_whatever_the_stage(world, tmp_path):
    # fp32 at stage 0 is PyTorch's own AdamW and clipping, which reads its settings at every step.
    plain = config("s2_low_all", 1, "zero0")
    expected = world(2).run(resumed_with_other_settings, plain, str(tmp_path / "zero0"))[0]
    unchanged = world(2).run(undisturbed_and_resumed, plain, str(tmp_path / "unchanged"))[0]
    assert abs(unchanged[1][1] - expected[0][2]) > 3e-5  # the settings make a difference
    for zero in ("zero1", "zero2", "zero3"):
        run = config("s2_low_all", 1, zero)
        losses, sizes = world(2).run(resumed_with_other_settings, run, str(tmp_path / zero))[0]
        assert losses == pytest.approx(expected[0], rel=2e-6), zero
        assert sizes == pytest.approx(expected[1], rel=1e-4), zero
