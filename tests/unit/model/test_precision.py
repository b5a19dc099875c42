"""``bf16_mixed`` against float64, beside the same model written in plain operations under PyTorch's
autocast."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support import reference
from support.models import MODELS
from torch.nn import functional

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.model.dtypes import autocast_dtype, weights_dtype
from megatron_lpa.model.init import initialize
from megatron_lpa.model.recompute import recompute_for
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups

ALONE = ParallelGroups.single()


def decoder_of(model: ModelConfig, precision: str, kernels: KernelConfig, mode: str = "none") -> Decoder:
    decoder = Decoder(model, ALONE, "latent", recompute_for(mode), kernels, autocast_dtype(precision))
    initialize(decoder, model, ALONE, 27)
    return decoder.to(weights_dtype(precision))


def weights_of(decoder: Decoder, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {n: p.detach().to(dtype, copy=True).requires_grad_() for n, p in decoder.named_parameters()}


def ids_of(model: ModelConfig, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab_size, (8, model.sequence_length + 1), generator=generator)


def joined(gradients: list[torch.Tensor | None]) -> torch.Tensor:
    assert all(g is not None and g.isfinite().all() for g in gradients)
    return torch.cat([g.double().flatten() for g in gradients if g is not None])


def exact(model: ModelConfig, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    weights = weights_of(decoder_of(model, "fp32", KernelConfig()), torch.float64)
    loss = reference.token_losses(weights, model, ids[:, :-1], ids[:, 1:]).mean()
    loss.backward()
    return loss.item(), joined([w.grad for w in weights.values()])


def autocast_reference(model: ModelConfig, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    weights = weights_of(decoder_of(model, "fp32", KernelConfig()), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = reference.logits(weights, model, ids[:, :-1])[..., : model.vocab_size]
    loss = functional.cross_entropy(scores.float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), joined([w.grad for w in weights.values()])


def ours(
    model: ModelConfig, ids: torch.Tensor, precision: str, kernels: KernelConfig, mode: str = "none"
) -> tuple[float, torch.Tensor]:
    decoder = decoder_of(model, precision, kernels, mode)
    losses = decoder(ids[:, :-1], ids[:, 1:])
    assert losses.dtype == torch.float32
    losses.mean().backward()
    return losses.mean().item(), joined([p.grad for p in decoder.parameters()])


KERNELS = [
    KernelConfig(),
    KernelConfig(lowdim="joined", loss="chunked"),
]


@pytest.mark.parametrize("name", ["s2_transformer", "s2_lpa", "gqa_wide_heads", "padded_with_bias"])
def test_gradients_are_as_near_to_float64_as_those_of_plain_autocast(name: str) -> None:
    """Without ReLU, whose steps turn roundings into whole units."""
    model = MODELS[name]
    errors: dict[str, list[float]] = {}
    for seed in range(3):
        ids = ids_of(model, seed)
        loss, gradient = exact(model, ids)
        found = {
            "plain": autocast_reference(model, ids),
            "bf16": ours(model, ids, "bf16", KernelConfig()),
            **{f"mixed {k.lowdim}": ours(model, ids, "bf16_mixed", k) for k in KERNELS},
        }
        for key, (value, candidate) in found.items():
            assert value == pytest.approx(loss, rel=5e-4), key
            errors.setdefault(key, []).append(float((candidate - gradient).norm() / gradient.norm()))
    mean = {key: statistics.mean(values) for key, values in errors.items()}
    for key in ("mixed auto", "mixed joined"):
        assert mean[key] < 1.1 * mean["plain"], (key, mean)
        assert mean[key] < 0.85 * mean["bf16"], (key, mean)


@pytest.mark.parametrize("name", ["s1_low_all", "s1_prenorm", "tied_gelu_padded", "s2_low_all"])
def test_every_kind_of_layer_computes_under_autocast(name: str) -> None:
    model = MODELS[name]
    ids = ids_of(model, 0)
    loss, gradient = exact(model, ids)
    plain = autocast_reference(model, ids)[1]
    allowed = 2 * float((plain - gradient).norm() / gradient.norm())
    for kernels in KERNELS:
        value, found = ours(model, ids, "bf16_mixed", kernels)
        assert value == pytest.approx(loss, rel=1e-3)
        assert float((found - gradient).norm() / gradient.norm()) < allowed, kernels


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("kernels", [KernelConfig(), KernelConfig(lowdim="joined", loss="chunked")])
def test_recomputing_changes_no_gradient(mode: str, kernels: KernelConfig) -> None:
    model = replace(MODELS["s2_low_all"], dropout=0.0)
    ids = ids_of(model, 0)
    kept, recomputed = (ours(model, ids, "bf16_mixed", kernels, m) for m in ("none", mode))
    assert recomputed[0] == kept[0]
    assert torch.equal(recomputed[1], kept[1])


def test_products_are_in_bf16_and_the_residual_stream_norms_and_gradients_in_fp32() -> None:
    decoder = decoder_of(MODELS["s2_transformer"], "bf16_mixed", KernelConfig())
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, out: seen.update(
            {name: (out if torch.is_tensor(out) else out[0]).dtype}
        )

    for name, module in decoder.layers[0].named_modules():
        module.register_forward_hook(note(name))
    ids = ids_of(MODELS["s2_transformer"], 0)
    decoder(ids[:, :-1], ids[:, 1:]).mean().backward()
    half = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert half == {"attention", "attention.qkv", "attention.o", "ffn", "ffn.inputs", "ffn.down"}
    assert {seen[name] for name in ("", "attention_norm", "ffn_norm")} == {torch.float32}
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    with torch.no_grad():
        assert decoder(ids[:, :-1]).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
