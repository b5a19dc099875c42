"""Initial values: distributions, and independence of everything but seed and name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.models import LPA, SETTING_1, lowdim
from torch import nn

from megatron_lpa.config import ModelConfig
from megatron_lpa.model.init import initialize
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups


def weights(model: ModelConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    decoder = Decoder(model, ParallelGroups.single())
    initialize(decoder, model, ParallelGroups.single(), seed)
    return {name: p.detach() for name, p in decoder.named_parameters()}


WIDE = ModelConfig(
    vocab_size=500, sequence_length=64, hidden_size=256, num_layers=2, num_heads=4, ffn_hidden_size=512,
    projections=lowdim(q=64, k=64, v=64, o=64),
)  # fmt: skip


def test_pytorch_init_draws_from_the_ranges_of_nn_linear_and_nn_embedding():
    drawn = weights(WIDE)
    linear = nn.Linear(256, 512)
    for name, other in (
        ("layers.0.ffn.inputs.up_weight", linear.weight),
        ("layers.0.ffn.inputs.up_bias", linear.bias),
    ):
        value = drawn[name]
        assert float(value.abs().max()) <= 1 / 16
        assert float(value.std()) == pytest.approx(float(other.std()), rel=0.1)
    # The second factor of a pair is a linear with r inputs.
    assert float(drawn["layers.0.attention.qkv.q_w_b"].std()) == pytest.approx(
        1 / math.sqrt(3 * 64), rel=0.05
    )
    assert float(drawn["layers.0.attention.o.bias_b"].abs().max()) <= 1 / 8
    assert float(drawn["token_embedding.weight"].std()) == pytest.approx(1.0, rel=0.02)
    assert drawn["layers.0.ffn_norm.weight"].eq(1).all() and drawn["layers.0.ffn_norm.bias"].eq(0).all()


def test_normal_init_gives_pairs_the_deviation_of_the_dense_matrix():
    drawn = weights(replace(WIDE, init="normal", init_std=0.05))
    product = drawn["layers.1.attention.qkv.v_w_b"] @ drawn["layers.1.attention.qkv.v_w_a"]
    assert float(product.std()) == pytest.approx(0.05, rel=0.05)
    output = drawn["layers.1.attention.o.w_b"] @ drawn["layers.1.attention.o.w_a"]
    assert float(output.std()) == pytest.approx(0.05 / math.sqrt(2 * 2), rel=0.05)
    assert float(drawn["layers.1.ffn.inputs.up_weight"].std()) == pytest.approx(0.05, rel=0.05)
    assert drawn["layers.1.ffn.inputs.up_bias"].eq(0).all()


def test_values_depend_on_seed_and_name_only():
    dense, mixed = weights(SETTING_1), weights(replace(SETTING_1, projections=LPA, num_layers=3))
    for name in ("token_embedding.weight", "layers.1.ffn.down.weight", "head.bias"):
        assert torch.equal(dense[name], mixed[name])
    assert not torch.equal(dense["layers.0.ffn.down.weight"], dense["layers.1.ffn.down.weight"])
    assert not torch.equal(dense["head.weight"], weights(SETTING_1, seed=4)["head.weight"])


def test_padding_the_vocabulary_changes_no_value():
    padded = weights(replace(SETTING_1, vocab_size=61, pad_vocab_to_multiple_of=16))
    plain = weights(replace(SETTING_1, vocab_size=61))
    for name, value in plain.items():
        assert torch.equal(padded[name][: value.shape[0]], value), name
    assert padded["head.weight"].shape[0] == 64
    assert not padded["head.weight"][61:].any()


def test_initial_values_never_change_silently():
    # Golden values: a change here would change every run that starts from a seed.
    drawn = weights(SETTING_1, seed=27)
    assert drawn["token_embedding.weight"][0, :3].tolist() == pytest.approx(GOLDEN_EMBEDDING, abs=1e-6)
    assert drawn["layers.1.attention.o.weight"][0, :3].tolist() == pytest.approx(GOLDEN_OUTPUT, abs=1e-6)


GOLDEN_EMBEDDING = [-1.6856828, 1.3981878, -0.1372313]
GOLDEN_OUTPUT = [-0.1221336, 0.1386785, 0.1465199]
