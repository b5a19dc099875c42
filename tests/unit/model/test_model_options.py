"""Output biases, layers that differ, decay by option: what is counted is what is built, and nothing else
moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.models import LPA, MODELS, SETTING_1, lowdim

from megatron_lpa.config import ModelConfig, OptimConfig, ParallelConfig, ProjectionConfig, TrainConfig
from megatron_lpa.model.init import initialize
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import spec_of
from megatron_lpa.planning.flops import flops_per_token_forward
from megatron_lpa.planning.memory import (
    bytes_activations,
    kept_bytes_per_token_layer,
    saved_bytes_per_token_layer,
)
from megatron_lpa.planning.parameters import count_parameters, parameters_per_tensor_rank
from megatron_lpa.planning.traffic import collective_elements_per_token

BY_LAYER = replace(SETTING_1, num_layers=3, projections=lowdim(by_layer={"0": "dense", "2": 4}, q=8, o=8))


def built(model: ModelConfig, layout: str = "latent") -> Decoder:
    return Decoder(model, ParallelGroups.single(), layout)


@pytest.mark.parametrize("layout", ["column_row", "latent"])
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_built_decoder(name: str, layout: str) -> None:
    model = MODELS[name]
    decoder = built(model, layout)
    count = count_parameters(model)
    by_part = dict.fromkeys(("embedding", "attention", "ffn", "norm", "head"), 0)
    for key, parameter in decoder.named_parameters():
        part = next(p for p in ("embedding", "norm", "attention", "ffn", "head") if p in key)
        by_part[part] += parameter.numel()
    assert vars(count) == by_part
    for size in (1, 2, 4):
        own = 0
        for parameter in decoder.parameters():
            own_elements = 1
            for extent in spec_of(parameter).local_shape(size):
                own_elements *= extent
            own += own_elements
        assert parameters_per_tensor_rank(model, ParallelConfig(size, layout)) == own  # type: ignore[arg-type]


def test_flops_of_layers_that_differ() -> None:
    matrices = 4 * 32 * 32 - 2 * 32 * 32 + 2 * 32 * 48  # k, v, up, down
    qo = 2 * (32 * 32 + 8 * 64 + 4 * 64)  # q and o: dense, rank 8, rank 4
    attention = 3 * 2 * 12 * 32
    assert flops_per_token_forward(BY_LAYER) == 2 * (3 * matrices + qo) + attention + 2 * 64 * 32


def test_traffic_of_layers_that_differ_is_their_mean() -> None:
    moved = collective_elements_per_token(BY_LAYER, ParallelConfig(2, "latent"))
    # q: 0, 8, 4; o: all-reduce of 32, 8, 4 elements, each counted twice.
    assert moved.attention_forward == pytest.approx((0 + 8 + 4 + 64 + 16 + 8) / 3)
    assert moved.attention_backward == pytest.approx((0 + 8 + 4) / 3 + 64)
    assert moved.ffn_forward == 64


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_of_layers_that_differ_are_the_sum_of_each(recompute: str) -> None:
    train = TrainConfig(micro_batch_size=2, precision="fp32", activation_checkpointing=recompute)  # type: ignore[arg-type]
    parallel = ParallelConfig()
    layers = [BY_LAYER.at_layer(layer) for layer in range(3)]
    kept = [kept_bytes_per_token_layer(layer, parallel, train) for layer in layers]
    assert len(set(kept)) == (1 if recompute == "full" else 3)
    one = [replace(layer, num_layers=1) for layer in layers]
    peaks = [bytes_activations(m, parallel, train) - 24 * k for m, k in zip(one, kept, strict=True)]
    assert bytes_activations(BY_LAYER, parallel, train) == 24 * sum(kept) + max(peaks)


def test_latents_of_layers_are_their_own() -> None:
    train = TrainConfig(precision="fp32")
    saved = [saved_bytes_per_token_layer(BY_LAYER.at_layer(n), ParallelConfig(), train)[0] for n in range(3)]
    assert [saved[0] + 4 * 16, saved[0] + 4 * 8] == saved[1:]


def weights(model: ModelConfig) -> dict:
    decoder = built(model)
    initialize(decoder, model, ParallelGroups.single(), 3)
    return dict(decoder.named_parameters())


def test_options_move_no_other_initial_value() -> None:
    plain = weights(replace(SETTING_1, projections=LPA))
    options = lowdim(bias="both", by_layer={"1": "dense"}, q=8, v=8)
    options = replace(
        options,
        q=replace(options.q, bias="output"), v=ProjectionConfig("lowdim", 8, "both"),
        k=ProjectionConfig("lowdim", 8), o=ProjectionConfig("lowdim", 8, "none"),
    )  # fmt: skip
    changed = weights(replace(SETTING_1, activation="gelu_tanh", projections=options))
    assert "layers.0.attention.qkv.q_bias_b" in changed and "layers.1.attention.qkv.q_weight" in changed
    shared = plain.keys() & changed.keys()
    assert len(shared) > 20 and "layers.0.attention.qkv.q_w_b" in shared
    assert all(plain[name].equal(changed[name]) for name in shared)
    bias = changed["layers.0.attention.qkv.v_bias_b"].detach()
    assert 0 < float(bias.abs().max()) <= 8**-0.5  # as nn.Linear draws for a matrix that reads r = 8 numbers


@pytest.mark.parametrize(("biases", "norms"), [(False, False), (True, False), (False, True), (True, True)])
def test_what_decays(biases: bool, norms: bool) -> None:
    optim = OptimConfig(decay_biases=biases, decay_norms=norms)
    for name, parameter in built(MODELS["both_biases_gelu_tanh"]).named_parameters():
        expected = norms if "norm" in name else biases if "bias" in name else True
        assert spec_of(parameter).decays(optim.decay_biases, optim.decay_norms) == expected, name


def test_structures_are_those_of_the_layer() -> None:
    dense, pair = (BY_LAYER.at_layer(n).structure("o") for n in (0, 2))
    assert set(dense.specs()) == {"weight", "bias"} and pair.specs()["w_a"].shape == (4, 32)
    assert set(MODELS["output_biases"].structure("q", 2, "column_row").specs()) == {
        "w_a",
        "w_b",
        "bias_b",
    }
