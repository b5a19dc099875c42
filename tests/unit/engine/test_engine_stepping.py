"""The step of one replica, in one process without a process group."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from megatron_lpa.engine.stepping import OneReplica, gradient_norm
from megatron_lpa.parallel.groups import ParallelGroups


class Line(nn.Module):
    """Losses of a linear map; one parameter takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        self.idle = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.to(self.weight.dtype) @ self.weight.T - y).float().square()


def replica(dtype: torch.dtype, micro_steps: int, clip: float, decay: float = 0.1) -> OneReplica:
    module = Line()

    def adamw(stepped_on: Callable[[nn.Parameter], torch.Tensor]) -> torch.optim.Optimizer:
        parameters = [stepped_on(p) for p in module.parameters()]
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=decay, fused=True)

    return OneReplica(module, dtype, adamw, ParallelGroups.single(), micro_steps, clip)


def batches(count: int, scale: float = 1.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (scale * torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator))
        for _ in range(count)
    ]


def step(stepper: OneReplica, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    for number, (x, y) in enumerate(micro_batches):
        stepper.backward(stepper(x, y).mean(), last=number == len(micro_batches) - 1)
    return float(stepper.update())


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6], ids=["off", "clips", "does not clip"])
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_steps_are_those_of_pytorchs_clipping_and_adamw_in_fp64(clip: float, micro_steps: int) -> None:
    stepper, plain = replica(torch.float32, micro_steps, clip), Line().double()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.1)
    for number in range(4):
        micro_batches = batches(micro_steps, 1.0 + number)
        x, y = (torch.cat(tensors).double() for tensors in zip(*micro_batches, strict=True))
        optimizer.zero_grad()
        (x @ plain.weight.T - y).square().mean().backward()
        plain.idle.grad = torch.zeros_like(plain.idle)  # it decays all the same
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
        optimizer.step()
        assert step(stepper, micro_batches) == pytest.approx(float(norm), rel=1e-5)
        for own, expected in zip(stepper.parameters, plain.parameters(), strict=True):
            torch.testing.assert_close(own.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_bf16_sums_micro_batches_in_fp32_and_keeps_fp32_masters() -> None:
    stepper = replica(torch.bfloat16, 8, 0.0, decay=0.0)
    start = [master.clone() for master in stepper.masters]
    assert all(torch.equal(m, p.float()) for m, p in zip(start, stepper.parameters, strict=True))
    micro_batches = batches(8)
    sums = torch.zeros(3, 4, dtype=torch.float64)
    for x, y in micro_batches:
        weight = stepper.parameters[0].detach().clone().requires_grad_()
        ((x.bfloat16() @ weight.T - y).float().square().mean() / 8).backward()
        assert weight.grad is not None
        sums += weight.grad.double()
    assert step(stepper, micro_batches) == pytest.approx(float(sums.norm()), rel=1e-6)
    for master, parameter in zip(stepper.masters, stepper.parameters, strict=True):
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), parameter)
        assert parameter.grad is None and master.grad is None
    assert not torch.equal(stepper.masters[0], stepper.parameters[0].float())  # more than bf16 can hold


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_not_finite_changes_nothing_and_is_counted(bad: float, dtype: torch.dtype) -> None:
    stepper, other = replica(dtype, 2, 0.5), replica(dtype, 2, 0.5)
    good = batches(2)
    step(stepper, good), step(other, good)
    spoilt = [(good[0][0], good[0][1]), (good[1][0] * bad, good[1][1])]
    assert not math.isfinite(step(stepper, spoilt))
    assert stepper.skipped_steps == 1
    step(stepper, good), step(other, good)
    assert (stepper.skipped_steps, other.skipped_steps) == (1, 0)
    for own, expected in zip(stepper.masters, other.masters, strict=True):
        assert torch.equal(own, expected)
        state, expected_state = stepper.optimizer.state[own], other.optimizer.state[expected]
        assert all(torch.equal(state[key], expected_state[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_the_norm_of_a_large_gradient_is_that_of_fp64() -> None:
    """An embedding's: added up in fp32, one square after another, it would come out 0.14 % too small."""
    weight = nn.Parameter(torch.empty(32_000, 768))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    expected = float(weight.grad.double().norm())
    found = gradient_norm([weight], [weight], ParallelGroups.single())
    assert float(found) == pytest.approx(expected, rel=1e-6)
