"""Costs against hand-worked numbers, the paper's, and the shapes that the layers really allocate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_lpa.config import (
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    ProjectionConfig,
    ProjectionsConfig,
    TrainConfig,
    load_config,
    preset_names,
)
from megatron_lpa.layers.sublayers import rope_tables
from megatron_lpa.model.dtypes import autocast_dtype
from megatron_lpa.model.transformer import Decoder, DecoderLayer
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.planning.flops import (
    flops_per_token_forward,
    flops_per_token_training,
    hardware_flops_per_token_training,
)
from megatron_lpa.planning.memory import (
    bytes_activations,
    bytes_cast_weights,
    estimate_memory,
    saved_bytes_per_token_layer,
)
from megatron_lpa.planning.parameters import count_parameters, parameters_per_tensor_rank
from megatron_lpa.planning.traffic import collective_elements_per_token


def pair(rank: int) -> ProjectionConfig:
    return ProjectionConfig("lowdim", rank)


SMALL = ModelConfig(
    vocab_size=6,
    pad_vocab_to_multiple_of=8,
    sequence_length=4,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    head_dim=3,
    ffn_hidden_size=10,
    final_norm=True,
    projections=ProjectionsConfig(q=pair(2), o=pair(4), down=pair(2)),
)
"""q: 8 -> 6 through 2, k and v: 8 -> 6, o: 6 -> 8 through 4, up: 8 -> 10, down: 10 -> 8 through 2."""

ATTENTION_512 = ProjectionsConfig(q=pair(512), k=pair(512), v=pair(512), o=pair(512))


def preset(name: str) -> ModelConfig:
    return load_config(["--preset", name]).model


def test_parameters_of_a_hand_counted_model() -> None:
    count = count_parameters(SMALL)
    # q 2(8+6)+2, k and v 8*6+6, o 4(6+8)+8; up 8*10+10, down 2(10+8)+8; two layers.
    assert count.attention == 2 * (30 + 54 + 54 + 64)
    assert count.ffn == 2 * (90 + 44)
    assert count.embedding == 8 * 8 + 4 * 8  # 8 padded ids, 4 positions
    assert count.norm == 5 * 16  # two per layer and a final one, weight and bias
    assert count.head == 8 * 8 + 8
    assert count.total == 404 + 268 + 96 + 80 + 72


def test_options_that_remove_parameters() -> None:
    bare = replace(
        SMALL,
        norm="rmsnorm",
        final_norm=False,
        linear_bias=False,
        position_embedding="rope",
        tie_embeddings=True,
        num_kv_heads=1,
    )
    count = count_parameters(bare)
    assert count.attention == 2 * (28 + 24 + 24 + 56)  # one key/value head of 3
    assert count.ffn == 2 * (80 + 36)
    assert (count.embedding, count.norm, count.head) == (64, 4 * 8, 8)  # tied: only the head's bias
    assert count_parameters(replace(bare, lm_head_bias=False)).head == 0
    swiglu = count_parameters(replace(bare, activation="swiglu"))
    assert swiglu.ffn == count.ffn + 2 * 80  # gate


def test_flops_of_a_hand_counted_model() -> None:
    # Matrices 28+48+48+56+80+36 = 296 per layer; scores and values: 2 * 4 tokens * width 6 = 48; head 8*8.
    assert flops_per_token_forward(SMALL) == 2 * (2 * 296 + 48) + 2 * 64
    assert flops_per_token_training(SMALL) == 3 * 1408
    assert hardware_flops_per_token_training(SMALL, "none") == 3 * 1408
    assert hardware_flops_per_token_training(SMALL, "full") == 3 * 1408 + (1408 - 128)


def test_flops_of_the_3b_models_are_what_arithmetic_allows() -> None:
    """paper.md, "Efficiency": 6.70 vs 5.09 GFLOP per token forward, a ratio of 1.316, 24.0 %."""
    transformer, lpa = (flops_per_token_forward(preset(f"3b/{name}")) for name in ("transformer", "lpa"))
    assert (round(transformer / 1e9, 2), round(lpa / 1e9, 2)) == (6.70, 5.09)
    assert round(transformer / lpa, 3) == 1.316
    assert round(100 * (1 - lpa / transformer), 1) == 24.0


@pytest.mark.parametrize(
    ("layout", "lowdim", "forward", "backward"),
    [
        # dense: all-reduce of the output; in backward, of the input's gradient. 2 * 4096.
        ("latent", False, 8192, 8192),
        # rank: 3 * 4096 + 512 + 2 * 4096; in backward gathers in place of scatters.
        ("column_row", True, 20992, 20992),
        # latent: 3 * 512 + 2 * 512; in backward 3 * 512 + 2 * 4096.
        ("latent", True, 2560, 9728),
    ],
)
def test_elements_moved_by_attention(layout: str, lowdim: bool, forward: int, backward: int) -> None:
    model = ModelConfig(hidden_size=4096, num_heads=32, ffn_hidden_size=14336)
    if lowdim:
        model = replace(model, projections=ATTENTION_512)
    moved = collective_elements_per_token(model, ParallelConfig(8, layout))  # type: ignore[arg-type]
    assert (moved.attention_forward, moved.attention_backward) == (forward, backward)
    assert (moved.ffn_forward, moved.ffn_backward) == (8192, 8192)  # dense
    assert (moved.forward, moved.backward) == (forward + 8192, backward + 8192)


def test_elements_moved_by_a_lowdim_swiglu_ffn_with_grouped_queries() -> None:
    projections = ProjectionsConfig(k=pair(4), up=pair(2), gate=pair(6), down=pair(8))
    model = ModelConfig(
        hidden_size=16,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=24,
        activation="swiglu",
        projections=projections,
    )
    latent = collective_elements_per_token(model, ParallelConfig(2, "latent"))
    assert (latent.attention_forward, latent.attention_backward) == (4 + 2 * 16, 4 + 2 * 16)
    assert (latent.ffn_forward, latent.ffn_backward) == (2 + 6 + 2 * 8, 2 + 6 + 2 * 16)
    rank = collective_elements_per_token(model, ParallelConfig(2, "column_row"))
    assert (rank.attention_forward, rank.attention_backward) == (8 + 2 * 16, 8 + 2 * 16)  # k is 2 x 4 wide
    assert (rank.ffn_forward, rank.ffn_backward) == (24 + 24 + 8 + 2 * 16, 24 + 24 + 8 + 2 * 16)


def test_parameters_of_one_tensor_parallel_rank() -> None:
    # Whole on both ranks: norms 80, positions 32, the biases of o and down 2(8+8); in `latent` also their
    # W_B, 2(8*4 + 8*2). The rest of 920 is halved.
    assert parameters_per_tensor_rank(SMALL, ParallelConfig(2, "column_row")) == 144 + (920 - 144) // 2
    assert parameters_per_tensor_rank(SMALL, ParallelConfig(2, "latent")) == 240 + (920 - 240) // 2
    assert parameters_per_tensor_rank(SMALL, ParallelConfig(1, "latent")) == 920


@pytest.mark.parametrize("layout", ["column_row", "latent"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in preset_names() if not name.endswith("same_param")])
def test_projections_agree_with_what_the_layers_allocate(name: str, tp_size: int, layout: str) -> None:
    model = preset(name)
    if model.padded_vocab_size % tp_size:  # the public code's 32,001 ids
        model = replace(model, pad_vocab_to_multiple_of=tp_size)
    full = shard = 0
    for projection in model.projection_widths():
        for spec in model.structure(projection, tp_size, layout).specs().values():
            full += model.num_layers * math.prod(spec.shape)
            shard += model.num_layers * math.prod(spec.local_shape(tp_size))
    count = count_parameters(model)
    assert count.attention + count.ffn == full
    positions = model.sequence_length * model.hidden_size if model.position_embedding == "learned" else 0
    vocabulary = count.embedding - positions + count.head
    expected = shard + count.norm + positions + vocabulary // tp_size
    assert parameters_per_tensor_rank(model, ParallelConfig(tp_size, layout)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model",
    [
        SMALL,
        replace(SMALL, linear_bias=False, lm_head_bias=False, norm="rmsnorm", tie_embeddings=True),
        replace(SMALL, activation="swiglu", position_embedding="none", final_norm=False, norm_position="pre"),
    ],
)
def test_the_decoder_has_as_many_parameters(model: ModelConfig) -> None:
    decoder = Decoder(model, ParallelGroups.single())
    assert sum(p.numel() for p in decoder.parameters()) == count_parameters(model).total


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(sequence_length=64, hidden_size=64, num_heads=4, ffn_hidden_size=160, dropout=0.0),
        ModelConfig(
            sequence_length=64,
            hidden_size=64,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=160,
            activation="swiglu",
            norm_position="pre",
            position_embedding="rope",
            dropout=0.0,
            projections=ProjectionsConfig(
                q=pair(8), k=pair(8), v=pair(16), o=pair(24), gate=pair(8), down=pair(4)
            ),
        ),
        ModelConfig(
            sequence_length=64,
            hidden_size=64,
            num_heads=8,
            head_dim=16,
            ffn_hidden_size=160,
            activation="gelu",
            dropout=0.0,
            projections=ProjectionsConfig(up=pair(8)),
        ),
    ],
    ids=["relu", "swiglu-lowdim-grouped", "gelu-wide"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_saved_bytes_are_what_autograd_keeps(model: ModelConfig, precision: str) -> None:
    """layernorm without dropout: the CPU, unlike CUDA, has no fused rmsnorm and no one-byte masks."""
    train = TrainConfig(precision=precision)  # type: ignore[arg-type]
    layer = DecoderLayer(model, ParallelGroups.single(), "latent", KernelConfig())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 64, 64, requires_grad=True)
    rope = rope_tables(64, 16, 1e4, x.device) if model.position_embedding == "rope" else None
    ignored = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *(rope or ()))}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage
        return tensor

    dtype = autocast_dtype(precision)
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = layer(x, rope)
    assert output.requires_grad
    kernels = KernelConfig(elementwise="eager")
    per_token, _ = saved_bytes_per_token_layer(model, ParallelConfig(), train, kernels)
    in_layers, _ = bytes_cast_weights(model, ParallelConfig(), train)
    expected = per_token * x[..., 0].numel() + in_layers // model.num_layers
    if (
        dtype is not None and rope is not None
    ):  # rotation without a compiler rounds both tables, for q and for k
        expected += 2 * 2 * rope[0].numel() * dtype.itemsize
    assert sum(storage.nbytes() for storage in kept.values()) == expected


@pytest.mark.parametrize(("layout", "latents"), [("latent", 8), ("column_row", 4)])
def test_activations_of_a_hand_counted_layer(layout: str, latents: int) -> None:
    parallel = ParallelConfig(2, layout)  # type: ignore[arg-type]
    train = TrainConfig(micro_batch_size=3, precision="bf16")
    saved, layer_input = saved_bytes_per_token_layer(SMALL, parallel, train)
    sublayers = 2 * (2 * 8 * 2 + 8 + 8)  # two bf16 tensors, two fp32 statistics, the dropout mask
    attention = (6 + 6 + 6 + 6) // 2 * 2 + 4 * 1  # q, k, v, output of one of two heads; its log-sum-exp
    ffn = 10 // 2 * 2
    assert saved == sublayers + attention + ffn + 2 * latents
    assert layer_input == 16
    at_loss = 2 * 8 * 2 + 4 * (
        2 + 4
    )  # final norm's and head's inputs; 4 ids: logits, which their gradient overwrites, and fp32 numbers
    assert bytes_activations(SMALL, parallel, train) == 12 * (2 * saved + at_loss)
    full = replace(train, activation_checkpointing="full")
    assert bytes_activations(SMALL, parallel, full) == 12 * (2 * 16 + saved)  # a layer outweighs the loss


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        ("bf16", 0, (1160, 2320, 6960)),
        ("bf16", 1, (1160, 2320, 1740)),
        ("bf16", 2, (1160, 580, 1740)),
        ("bf16", 3, (290, 580, 1740)),
        ("fp32", 0, (2320, 2320, 4640)),
        ("fp32", 3, (580, 580, 1160)),
        ("bf16_mixed", 1, (2320, 2320, 1160)),
        ("bf16_mixed", 3, (580, 580, 1160)),
    ],
)
def test_zero_divides_state_over_data_parallel_ranks(
    precision: str, stage: int, expected: tuple[int, int, int]
) -> None:
    """580 parameters per tensor-parallel rank, 4 data-parallel ranks; 2+4+12 or 4+4+8 bytes each."""
    train = TrainConfig(precision=precision)  # type: ignore[arg-type]
    kwargs = {"data_parallel_size": 4, "zero_stage": stage}
    memory = estimate_memory(SMALL, ParallelConfig(2, "latent"), train, **kwargs)
    assert (memory.bytes_parameters, memory.bytes_gradients, memory.bytes_optimizer_state) == expected
    assert memory.bytes_total == sum(expected) + memory.bytes_activations
    offloaded = estimate_memory(SMALL, ParallelConfig(2, "latent"), train, offload_optimizer=True, **kwargs)
    assert (offloaded.bytes_optimizer_state, offloaded.bytes_optimizer_state_host) == (0, expected[2])
    assert offloaded.bytes_total == memory.bytes_total - expected[2]
