"""Every choice of kernels against the reference, with tensor parallelism, ZeRO and activation
checkpointing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.test_engine import EVERY_PARAMETER, plain_pytorch, run_config, train_with_deepspeed
from distributed.test_tensor_parallel import random_ids, unsharded_weights
from support import reference
from support.models import MODELS
from support.world import groups_for

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.layers import cross_entropy
from megatron_lpa.model.recompute import recompute_for
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.sharding import merge, spec_of

CHUNKED = KernelConfig(loss="chunked")
EVERYTHING = KernelConfig(lowdim="joined", elementwise="compiled", loss="chunked")


def sharded(
    tp_size: int,
    model: ModelConfig,
    weights: dict[str, torch.Tensor],
    kernels: KernelConfig,
    mode: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Losses, local gradients, and what the loss alone made this rank send."""
    chunk_bytes = 5 * max(4, dtype.itemsize) * model.padded_vocab_size // tp_size  # of 5 tokens
    before, cross_entropy.LOSS_CHUNK_BYTES = cross_entropy.LOSS_CHUNK_BYTES, chunk_bytes
    try:
        groups = groups_for(tp_size)
        decoder = Decoder(model, groups, "latent", recompute_for(mode), kernels).to(dtype)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                spec = spec_of(parameter)
                full = weights[name]
                parameter.copy_(
                    full if spec.tp_dim is None else full.chunk(tp_size, spec.tp_dim)[groups.tp_rank]
                )
        ids = random_ids(model)
        losses = decoder(ids[:, :-1], ids[:, 1:])
        losses.mean().backward()
    finally:
        cross_entropy.LOSS_CHUNK_BYTES = before
    return {
        "losses": losses.detach().numpy(),
        "gradients": {name: p.grad.numpy() for name, p in decoder.named_parameters()},
        "specs": {name: spec_of(p) for name, p in decoder.named_parameters()},
        "all_reduced": groups.traffic.elements["all_reduce"],
    }


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["s1_low_all", "s2_lpa", "tied_gelu_padded", "padded_with_bias"])
def test_chunked_loss_under_selective_checkpointing_equals_the_reference(world, name, tp_size):
    """fp64 throughout. ``padded_with_bias`` leaves ranks 3 and 4 of four without a real id."""
    model = MODELS[name]
    weights = {key: value.double() for key, value in unsharded_weights(model).items()}
    if model.lm_head_bias:
        weights["head.bias"][model.vocab_size :] = 1e4
    arguments = (tp_size, model, weights, CHUNKED, "selective", torch.float64)
    results = world(4).run(sharded, *arguments)[:tp_size]
    exact = {key: value.clone().requires_grad_() for key, value in weights.items()}
    ids = random_ids(model)
    expected = reference.token_losses(exact, model, ids[:, :-1], ids[:, 1:])
    expected.mean().backward()
    # The tables of rotary embedding are fp32, and norms take their epsilon in it.
    tolerance = 1e-6 if model.position_embedding == "rope" else 1e-9
    for result in results:
        torch.testing.assert_close(
            torch.from_numpy(result["losses"]), expected.detach(), rtol=tolerance, atol=tolerance
        )
    largest = max(float(p.grad.abs().max()) for p in exact.values())
    for key, parameter in exact.items():
        shards = [torch.from_numpy(result["gradients"][key]) for result in results]
        torch.testing.assert_close(
            merge(shards, results[0]["specs"][key]), parameter.grad, rtol=tolerance, atol=tolerance * largest, msg=key  # noqa: E501
        )  # fmt: skip


def test_chunks_send_no_more_than_the_whole(world):
    model = MODELS["s1_lpa"]
    weights = unsharded_weights(model)
    sent = [
        world(4).run(sharded, 4, model, weights, KernelConfig(loss=kind), "none", torch.float32)[0]
        for kind in ("whole", "chunked")
    ]
    assert sent[0]["all_reduced"] == sent[1]["all_reduced"] > 0


CASES = [
    # processes, tensor parallel, ZeRO, model, kernels, checkpointing
    (1, 1, "zero0", "s2_low_all", EVERYTHING, "selective"),
    (2, 2, "zero1", "padded_with_bias", CHUNKED, "selective"),
    (2, 1, "zero2", "s2_low_all", CHUNKED, "selective"),
    (2, 1, EVERY_PARAMETER, "s2_low_all", EVERYTHING, "selective"),
    (2, 1, EVERY_PARAMETER, "tied_gelu_padded", CHUNKED, "none"),
    (2, 1, "zero3", "s1_low_all", KernelConfig(), "selective"),
    (2, 2, "zero3", "s1_transformer", KernelConfig(), "selective"),
    (4, 2, EVERY_PARAMETER, "tied_gelu_padded", CHUNKED, "selective"),
    (4, 2, EVERY_PARAMETER, "s1_low_all", replace(EVERYTHING, loss="whole"), "full"),
]


@pytest.mark.parametrize(("processes", "tp_size", "zero", "name", "kernels", "mode"), CASES)
def test_training_equals_plain_pytorch(world, processes, tp_size, zero, name, kernels, mode):
    model = MODELS[name]
    losses, norms, weights = plain_pytorch(model)
    config = run_config(model, tp_size, "latent", zero, activation_checkpointing=mode)
    results = world(processes).run(train_with_deepspeed, replace(config, kernels=kernels))
    for rank_losses, rank_norms, _ in results:
        assert rank_losses == pytest.approx(losses, rel=2e-5)
        assert rank_norms == pytest.approx(norms, rel=1e-4)
    for key, expected in weights.items():
        found = torch.from_numpy(results[0][2][key]).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=3e-4, msg=key)


@pytest.mark.parametrize("zero", ["zero1", "zero2", EVERY_PARAMETER])
def test_checkpointing_changes_no_bit_of_bf16_training(world, zero):
    model = replace(MODELS["s2_lpa"], dropout=0.2)
    curves = {
        mode: world(2).run(
            train_with_deepspeed,
            run_config(model, 1, "latent", zero, precision="bf16", activation_checkpointing=mode),
        )[0][:2]
        for mode in ("none", "selective", "full")
    }
    assert curves["selective"] == curves["none"]
    assert curves["full"] == curves["none"]
