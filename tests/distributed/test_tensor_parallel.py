"""Tensor parallelism against an unsharded float64 decoder: logits, losses, every gradient, traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import reference
from support.models import LPA, MODELS, SETTING_1, lowdim
from support.world import groups_for

from megatron_lpa.config import KernelConfig, ModelConfig, ParallelConfig
from megatron_lpa.layers.sublayers import Attention
from megatron_lpa.model.init import initialize
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import merge, spec_of
from megatron_lpa.planning.traffic import collective_elements_per_token

BATCH, SEED = 3, 5
LAYOUTS = ("column_row", "latent")


def random_ids(model: ModelConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.vocab_size, (BATCH, model.sequence_length + 1), generator=generator)


def unsharded_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Initial weights with every value disturbed, so that no bias, norm or padding row is trivial."""
    decoder = Decoder(model, ParallelGroups.single())
    initialize(decoder, model, ParallelGroups.single(), SEED)
    generator = torch.Generator().manual_seed(2)
    return {
        name: (p + 0.1 * torch.randn(p.shape, generator=generator)).detach()
        for name, p in decoder.named_parameters()
    }


def sharded_results(
    tp_size: int, layout: str, model: ModelConfig, weights: dict[str, torch.Tensor], path: str = "auto"
) -> dict:
    """On each rank: gathered logits, losses, and gradients in local shards."""
    groups = groups_for(tp_size)
    decoder = Decoder(model, groups, layout, kernels=KernelConfig(lowdim=path))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            spec = spec_of(parameter)
            full = weights[name]
            shard = full if spec.tp_dim is None else full.chunk(tp_size, spec.tp_dim)[groups.tp_rank]
            parameter.copy_(shard)
    ids = random_ids(model)
    logits = decoder(ids[:, :-1]).detach()
    losses = decoder(ids[:, :-1], ids[:, 1:])
    losses.mean().backward()
    specs = {name: spec_of(p) for name, p in decoder.named_parameters()}
    return {
        "tp_rank": groups.tp_rank,
        "logits": logits.numpy(),
        "losses": losses.detach().numpy(),
        "gradients": {name: p.grad.numpy() for name, p in decoder.named_parameters()},
        "specs": specs,
    }


CASES = [
    (name, tp_size, layout, "auto")
    for name, model in MODELS.items()
    for tp_size in (1, 2, 4)
    for layout in LAYOUTS
    # A model without low-dimensional modules has no layout to vary.
    if layout == "latent" or any(spec.kind == "lowdim" for spec in vars(model.projections).values())
]
# The fused kernel's turn is in tests/kernels.
CASES += [
    (name, tp_size, "column_row", "joined")
    for name in ("s1_low_all", "s2_lpa", "s2_low_all", "s2_lpa_kv", "gqa_wide_heads")
    for tp_size in (1, 2)
]


@pytest.mark.parametrize(("name", "tp_size", "layout", "path"), CASES)
def test_logits_losses_and_gradients_equal_the_unsharded_reference(world, name, tp_size, layout, path):
    model = MODELS[name]
    weights = unsharded_weights(model)
    results = world(4).run(sharded_results, tp_size, layout, model, weights, path)[:tp_size]

    exact = {key: value.double().requires_grad_() for key, value in weights.items()}
    ids = random_ids(model)
    expected_logits = reference.logits(exact, model, ids[:, :-1])
    expected_losses = reference.token_losses(exact, model, ids[:, :-1], ids[:, 1:])
    expected_losses.mean().backward()

    logits = torch.cat([torch.from_numpy(result["logits"]) for result in results], dim=-1)
    torch.testing.assert_close(logits.double(), expected_logits.detach(), rtol=1e-4, atol=2e-5)
    for result in results:
        losses = torch.from_numpy(result["losses"])
        torch.testing.assert_close(losses.double(), expected_losses.detach(), rtol=1e-5, atol=1e-5)
    assert results[0]["gradients"].keys() == exact.keys()
    squares = 0.0
    largest = max(float(p.grad.abs().max()) for p in exact.values())
    for key, expected in exact.items():
        spec = results[0]["specs"][key]
        shards = [torch.from_numpy(result["gradients"][key]) for result in results]
        # Some gradients vanish (a bias of k moves all scores of a query alike): what is left is rounding.
        atol = max(1e-5 * float(expected.grad.abs().max()), 1e-7 * largest)
        if spec.tp_dim is None:  # replicated: every rank must hold the same whole gradient
            for shard in shards:
                torch.testing.assert_close(shard.double(), expected.grad, rtol=1e-4, atol=atol)
        merged = merge(shards, spec).double()
        torch.testing.assert_close(merged, expected.grad, rtol=1e-4, atol=atol, msg=key)
        squares += float(merged.square().sum())
    expected_norm = sum(float(p.grad.square().sum()) for p in exact.values()) ** 0.5
    assert squares**0.5 == pytest.approx(expected_norm, rel=1e-5)


def test_padded_ids_have_probability_zero_and_no_gradient(world):
    model = MODELS["padded_with_bias"]
    weights = unsharded_weights(model)
    weights["head.bias"][model.vocab_size :] = 1e4  # would win every prediction
    (result, *_) = world(4).run(sharded_results, 4, "latent", model, weights)
    exact = {key: value.double() for key, value in weights.items()}
    ids = random_ids(model)
    expected = reference.token_losses(exact, model, ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(torch.from_numpy(result["losses"]).double(), expected, rtol=1e-5, atol=1e-5)
    results = world(4).run(sharded_results, 4, "latent", model, weights)
    gradient = merge(
        [torch.from_numpy(r["gradients"]["head.weight"]) for r in results], result["specs"]["head.weight"]
    )
    assert not gradient[model.vocab_size :].any()
    assert gradient[: model.vocab_size].any()


def attention_traffic(layout: str, model: ModelConfig, tokens: int) -> tuple[int, int, int, int]:
    """Elements and bytes that one attention layer moves on this rank, forward and backward."""
    groups = groups_for(4)
    attention = Attention(model, groups, layout, KernelConfig())
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    x = torch.randn(1, tokens, model.hidden_size, requires_grad=True)
    y = attention(x, None)
    forward = sum(groups.traffic.elements.values()), sum(groups.traffic.bytes.values())
    groups.traffic.reset()
    y.sum().backward()
    return *forward, sum(groups.traffic.elements.values()), sum(groups.traffic.bytes.values())


WIDE = ModelConfig(
    vocab_size=64, sequence_length=8, hidden_size=4096, num_layers=1, num_heads=32, ffn_hidden_size=64,
    linear_bias=False, dropout=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "layout", "forward", "backward"),
    [
        # Elements per token before the factor (T-1)/T at d = 4096, r = 512; an all-reduce of n counts 2n.
        (None, "latent", 2 * 4096, 2 * 4096),
        (512, "column_row", 3 * 4096 + 512 + 2 * 4096, 3 * 4096 + 512 + 2 * 4096),
        (512, "latent", 3 * 512 + 2 * 512, 3 * 512 + 2 * 4096),
    ],
)
def test_attention_moves_exactly_the_elements_of_the_table(world, ranks, layout, forward, backward):
    model = WIDE if ranks is None else replace(WIDE, projections=lowdim(q=ranks, k=ranks, v=ranks, o=ranks))
    tokens = 8
    for moved in world(4).run(attention_traffic, layout, model, tokens):
        assert moved[0] == tokens * forward * 3 // 4
        assert moved[1] == 4 * moved[0]  # fp32
        assert moved[2] == tokens * backward * 3 // 4
        assert moved[3] == 4 * moved[2]


def layer_traffic(layout: str, model: ModelConfig) -> tuple[int, int]:
    """Elements that all decoder layers move on this rank, forward and backward."""
    groups = groups_for(4)
    decoder = Decoder(model, groups, layout)
    initialize(decoder, model, groups, SEED)
    x = torch.randn(BATCH, model.sequence_length, model.hidden_size, requires_grad=True)
    y = x
    for layer in decoder.layers:
        y = layer(y, None)
    forward = sum(groups.traffic.elements.values())
    groups.traffic.reset()
    y.sum().backward()
    return forward, sum(groups.traffic.elements.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["s1_lpa", "s1_low_all", "s2_low_ffn", "s2_lpa_kv", "gqa_wide_heads"])
def test_planned_traffic_equals_counted_traffic(world, name, layout):
    model = MODELS[name]
    planned = collective_elements_per_token(model, ParallelConfig(4, layout))
    tokens = BATCH * model.sequence_length * model.num_layers
    for forward, backward in world(4).run(layer_traffic, layout, model):
        assert forward == planned.forward * tokens * 3 // 4
        assert backward == planned.backward * tokens * 3 // 4


def initial_shards(tp_size: int, layout: str, model: ModelConfig) -> tuple[int, dict]:
    groups = groups_for(tp_size)
    decoder = Decoder(model, groups, layout)
    initialize(decoder, model, groups, SEED)
    return groups.tp_rank, {name: p.detach().numpy() for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("init", ["pytorch", "normal"])
def test_initial_weights_do_not_depend_on_the_layout(world, init):
    model = replace(SETTING_1, projections=LPA, init=init)
    whole = Decoder(model, ParallelGroups.single())
    initialize(whole, model, ParallelGroups.single(), SEED)
    for tp_size in (2, 4):
        for layout in LAYOUTS:
            results = world(4).run(initial_shards, tp_size, layout, model)[:tp_size]
            specs = {
                n: spec_of(p) for n, p in Decoder(model, ParallelGroups.single(), layout).named_parameters()
            }
            for name, parameter in whole.named_parameters():
                merged = merge([torch.from_numpy(shards[name]) for _, shards in results], specs[name])
                assert torch.equal(merged, parameter.detach()), (name, tp_size, layout)
