"""DeepSpeed training against plain PyTorch: the same curve for every ZeRO stage and layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import reference
from support.models import MODELS
from support.world import groups_for

from megatron_lpa.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_lpa.data.batches import micro_batch_indices
from megatron_lpa.model.init import initialize
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import spec_of

STEPS, GLOBAL_BATCH = 4, 8
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, grad_clip=0.5, warmup_steps=0)


def batches(model: ModelConfig) -> torch.Tensor:
    """(STEPS, GLOBAL_BATCH, S + 1)"""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(
        model.vocab_size, (STEPS, GLOBAL_BATCH, model.sequence_length + 1), generator=generator
    )


def run_config(model: ModelConfig, tp_size: int, layout: str, zero: str, **train: object) -> RunConfig:
    return RunConfig(
        model=model,
        parallel=ParallelConfig(tp_size, layout),
        optim=OPTIM,
        train=TrainConfig(
            **{
                "steps": STEPS, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2,
                "precision": "fp32", "deepspeed_config": zero, **train,
            }
        ),
    )  # fmt: skip


def plain_pytorch(
    model: ModelConfig, vector_decay: float = 0.0
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights of a float64 loop of ``torch.optim.AdamW``."""
    decoder = Decoder(model, ParallelGroups.single())
    initialize(decoder, model, ParallelGroups.single(), TrainConfig().seed)
    weights = {n: p.detach().double().requires_grad_() for n, p in decoder.named_parameters()}
    matrices = [p for p in weights.values() if p.dim() > 1]
    vectors = [p for p in weights.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": vector_decay}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-5,
    )  # fmt: skip
    losses, norms = [], []
    for ids in batches(model):
        optimizer.zero_grad()
        loss = reference.token_losses(weights, model, ids[:, :-1], ids[:, 1:]).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in weights.items()}


def train_with_deepspeed(config: RunConfig) -> tuple[list[float], list[float], dict]:
    """Losses, gradient norms and (on rank 0) final unsharded weights."""
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    groups = groups_for(config.parallel.tensor_parallel_size)
    engine = build_engine(config, groups)
    losses, norms = [], []
    for step, ids in enumerate(batches(config.model)):
        consumed = step * GLOBAL_BATCH
        positions = micro_batch_indices(
            consumed, GLOBAL_BATCH, config.train.micro_batch_size, groups.dp_rank, groups.dp_size
        )
        micro = [ids[torch.from_numpy(chunk - consumed)] for chunk in positions]
        result = engine.train_step(micro, [int(chunk[0]) for chunk in positions], OPTIM.lr)
        losses.append(float(engine.mean_over_replicas(result.loss)))
        norms.append(float(result.grad_norm))
    gathered = dict(EngineState(engine).gathered_weights())
    weights = {name: full.float().numpy() for name, full in gathered.items() if full is not None}
    engine.destroy()
    return losses, norms, weights


# What decays: matrices, and by option biases and norms. With both there is no second group.
@pytest.mark.parametrize(
    ("processes", "tp_size", "layout", "zero", "name"),
    [(1, 1, "latent", "zero0", "both_biases_gelu_tanh"), (2, 2, "column_row", "zero3", "ranks_by_layer"),
     (2, 1, "latent", "zero1", "output_biases"), (2, 1, "latent", "zero2", "first_layer_dense")],
)  # fmt: skip
def test_biases_and_norms_decay_by_option(world, processes, tp_size, layout, zero, name):
    run = run_config(MODELS[name], tp_size, layout, zero)
    run = replace(run, optim=replace(OPTIM, decay_biases=True, decay_norms=True))
    _, _, weights = plain_pytorch(run.model, vector_decay=0.1)
    results = world(processes).run(train_with_deepspeed, run)
    for key, value in results[0][2].items():
        torch.testing.assert_close(torch.from_numpy(value).double(), weights[key], rtol=1e-4, atol=2e-5)


# The shipped file keeps parameters below 100,000 elements on every rank, and these models have no others:
# this one gathers every parameter for each use and frees it afterwards.
EVERY_PARAMETER = str(Path(__file__).parents[1] / "support" / "zero3_every_parameter.json")

CASES = [
    # processes, tensor parallel, layout, ZeRO file, model
    (1, 1, "latent", "zero0", "s1_lpa"),
    (1, 1, "latent", "zero3", "s1_lpa"),
    (2, 1, "latent", "zero0", "s1_lpa"),
    (2, 2, "column_row", "zero0", "s1_lpa"),
    (2, 2, "latent", "zero1", "s1_lpa"),
    (2, 1, "latent", "zero2", "s2_low_all"),
    (2, 1, "latent", "zero3_offload", "s2_low_all"),
    (2, 2, "column_row", "zero3", "s2_low_all"),
    (4, 2, "column_row", "zero1", "s2_low_all"),
    (4, 2, "latent", "zero2", "gqa_wide_heads"),
    (4, 2, "column_row", "zero3", "s1_low_all"),
    (4, 2, "latent", "zero3", "s2_lpa"),
    (4, 4, "latent", "zero3", "tied_gelu_padded"),
    (4, 2, "latent", "zero3_offload", "padded_with_bias"),
    (2, 1, "latent", EVERY_PARAMETER, "tied_gelu_padded"),
    (4, 2, "column_row", EVERY_PARAMETER, "s1_low_all"),
    (4, 2, "latent", EVERY_PARAMETER, "gqa_wide_heads"),
    (4, 4, "latent", EVERY_PARAMETER, "tied_gelu_padded"),
]


@pytest.mark.parametrize(("processes", "tp_size", "layout", "zero", "name"), CASES)
def test_fp32_training_equals_plain_pytorch(world, processes, tp_size, layout, zero, name):
    model = MODELS[name]
    losses, norms, weights = plain_pytorch(model)
    results = world(processes).run(train_with_deepspeed, run_config(model, tp_size, layout, zero))
    for rank_losses, rank_norms, _ in results:
        assert rank_losses == pytest.approx(losses, rel=2e-5)
        assert rank_norms == pytest.approx(norms, rel=1e-4)
    assert results[0][2].keys() == weights.keys()
    for key, expected in weights.items():
        torch.testing.assert_close(
            torch.from_numpy(results[0][2][key]).double(), expected, rtol=1e-3, atol=3e-4, msg=key
        )


@pytest.mark.parametrize(
    ("processes", "tp_size", "zero", "precision"),
    [
        (1, 1, "zero3", "bf16"),
        (2, 2, "zero1", "bf16"),
        (2, 1, "zero2", "bf16"),
        (4, 2, EVERY_PARAMETER, "bf16"),
        (1, 1, "zero0", "bf16_mixed"),
        (2, 1, "zero0", "bf16_mixed"),
        (2, 1, "zero1", "bf16_mixed"),
        (4, 2, "zero2", "bf16_mixed"),
        (4, 2, EVERY_PARAMETER, "bf16_mixed"),
        (2, 1, "zero3_offload", "bf16_mixed"),
    ],
)
def test_bf16_training_follows_plain_pytorch(world, processes, tp_size, zero, precision):
    model = MODELS["s2_lpa"]
    losses, norms, _weights = plain_pytorch(model)
    config = run_config(model, tp_size, "column_row", zero, precision=precision)
    results = world(processes).run(train_with_deepspeed, config)
    for rank_losses, rank_norms, _ in results:
        assert rank_losses == pytest.approx(losses, rel=5e-3)  # bf16 keeps 8 bits
        assert rank_norms == pytest.approx(norms, rel=3e-2)


def small_updates(config: RunConfig) -> bool:
    """Whether a parameter moves under updates far below bf16's resolution of its value."""
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    groups = groups_for(config.parallel.tensor_parallel_size)
    engine = build_engine(config, groups)
    name = "final_norm.weight"  # ones: neighbours in bf16 are 0.0039 below
    before = dict(EngineState(engine).gathered_weights())[name]
    ids = batches(config.model)[0][:2]
    for _ in range(20):
        engine.train_step([ids] * engine.micro_steps, [0] * engine.micro_steps, 4e-4)
    after = dict(EngineState(engine).gathered_weights())[name]
    engine.destroy()
    return before is None or bool((before != after).any())


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_bf16_keeps_fp32_master_weights(world, zero):
    # One update of 4e-4 rounds away in bf16; 20 of them must not.
    config = run_config(MODELS["s2_lpa"], 1, "latent", zero, precision="bf16")
    assert all(world(2).run(small_updates, config))


@pytest.mark.parametrize(
    ("processes", "tp_size", "zero"), [(1, 1, "zero0"), (2, 2, "zero3"), (4, 2, EVERY_PARAMETER)]
)
def test_activation_checkpointing_changes_nothing(world, processes, tp_size, zero):
    model = replace(MODELS["s1_lpa"], dropout=0.2)
    kept = run_config(model, tp_size, "latent", zero)
    recomputed = run_config(model, tp_size, "latent", zero, activation_checkpointing="full")
    expected, actual = (world(processes).run(train_with_deepspeed, c)[0] for c in (kept, recomputed))
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert actual[1] == pytest.approx(expected[1], rel=1e-6)


def test_dropout_draws_the_same_masks_whatever_the_tensor_parallel_size(world):
    model = replace(MODELS["s1_lpa"], dropout=0.2)
    one = world(1).run(train_with_deepspeed, run_config(model, 1, "latent", "zero3"))[0]
    two = world(2).run(train_with_deepspeed, run_config(model, 2, "column_row", "zero3"))[0]
    four = world(4).run(train_with_deepspeed, run_config(model, 4, "latent", "zero1"))[0]
    without = world(1).run(
        train_with_deepspeed, run_config(replace(model, dropout=0.0), 1, "latent", "zero3")
    )[0]
    assert two[0] == pytest.approx(one[0], rel=2e-5)
    assert four[0] == pytest.approx(one[0], rel=2e-5)
    assert abs(without[0][1] - one[0][1]) > 1e-3  # the masks do something


def shards_under_zero_init(config: RunConfig) -> tuple[int, dict]:
    """Each rank's tensor-parallel shards, gathered only over data-parallel ranks."""
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import gathered_for_reading

    groups = groups_for(config.parallel.tensor_parallel_size)
    engine = build_engine(config, groups)
    shards = {}
    largest = 0
    for name, parameter in engine.module.named_parameters():
        largest = max(largest, parameter.ds_tensor.numel() * groups.dp_size / parameter.ds_numel)
        with gathered_for_reading(engine, parameter):
            shards[name] = parameter.detach().clone().numpy()
    engine.destroy()
    assert largest < 1.5, "a parameter is not partitioned over the data-parallel group"
    return groups.tp_rank, shards


def test_zero_init_keeps_each_tensor_parallel_ranks_own_slice(world):
    model = MODELS["s1_low_all"]
    whole = Decoder(model, ParallelGroups.single())
    initialize(whole, model, ParallelGroups.single(), TrainConfig().seed)
    for tp_rank, shards in world(4).run(shards_under_zero_init, run_config(model, 2, "column_row", "zero3")):
        specs = {
            n: spec_of(p) for n, p in Decoder(model, ParallelGroups.single(), "column_row").named_parameters()
        }
        for name, parameter in whole.named_parameters():
            dim = specs[name].tp_dim
            own = parameter.detach() if dim is None else parameter.detach().chunk(2, dim)[tp_rank]
            assert torch.equal(torch.from_numpy(shards[name]), own), (name, tp_rank)
