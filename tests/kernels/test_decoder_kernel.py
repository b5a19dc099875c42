"""A decoder whose low-dimensional modules go through the fused kernel, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.lowdim_cases import DEVICE
from support import reference
from support.models import MODELS, SETTING_2, lowdim

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.kernels import launch
from megatron_lpa.model.init import initialize
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups

FUSED = {
    **{name: MODELS[name] for name in ("s1_lpa", "s1_prenorm", "s2_lpa", "s2_low_all", "gqa_wide_heads")},
    "both_biases": replace(
        SETTING_2, projections=lowdim(bias="both", q=8, k=8, v=8, o=8, up=16, gate=16, down=16)
    ),
    "norm_of_dense_and_lowdim": replace(SETTING_2, projections=lowdim(q=8, v=8, o=8)),
}


def decoder_of(model: ModelConfig, kernels: KernelConfig) -> Decoder:
    decoder = Decoder(model, ParallelGroups.single(), kernels=kernels)
    initialize(decoder, model, ParallelGroups.single(), seed=3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return decoder.to(DEVICE)


@pytest.mark.parametrize("name", FUSED)
def test_losses_and_gradients_are_the_reference_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FUSED[name]
    launches: list[tuple[bool, bool]] = []
    forward = launch.forward

    def noted(*arguments: Any) -> Any:
        *_, norm_eps, rotary = arguments
        launches.append((norm_eps is not None, rotary is not None))
        return forward(*arguments)

    monkeypatch.setattr(launch, "forward", noted)
    decoder = decoder_of(model, KernelConfig(lowdim="fused"))
    ids = torch.randint(model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    losses = decoder(ids[:, :-1].to(DEVICE), ids[:, 1:].to(DEVICE))
    losses.mean().backward()

    products = [
        set(vars(model.projections)) & group for group in ({"q", "k", "v"}, {"o"}, {"gate", "up"}, {"down"})
    ]
    used = [[n for n in group if getattr(model.projections, n).kind == "lowdim"] for group in products]
    folds = model.norm == "rmsnorm" and [
        all(getattr(model.projections, n).kind == "lowdim" for n in names)
        for names in (("q", "k", "v"), ("gate", "up"))
    ]
    assert len(launches) == model.num_layers * sum(map(bool, used))
    with_norm, with_rotary = (sum(column) for column in zip(*launches, strict=True))
    assert with_norm == model.num_layers * sum(folds or [])
    # Rotation is in the kernel where q, k and v are one product.
    all_lowdim = all(getattr(model.projections, n).kind == "lowdim" for n in ("q", "k", "v"))
    assert with_rotary == model.num_layers * (model.position_embedding == "rope" and all_lowdim)

    exact = {key: p.detach().cpu().double().requires_grad_() for key, p in decoder.named_parameters()}
    expected = reference.token_losses(exact, model, ids[:, :-1], ids[:, 1:])
    expected.mean().backward()
    torch.testing.assert_close(losses.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    largest = max(float(p.grad.abs().max()) for p in exact.values())
    for key, parameter in decoder.named_parameters():
        found, wanted = parameter.grad.cpu().double(), exact[key].grad
        atol = max(1e-5 * float(wanted.abs().max()), 1e-7 * largest)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol, msg=key)
