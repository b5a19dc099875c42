"""Inputs, the float64 reference, and errors, for tests of the low-dimensional product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from megatron_lpa.layers.sublayers import rope_tables
from megatron_lpa.ops.products import Norm, Pair, Rotary, lowdim_linears

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""On ||out - reference|| / ||reference||: sums in fp32, one rounding of the latent and one of the output.
bf16 is doubled, because Triton's interpreter cuts fp32 to bf16 instead of rounding."""


@dataclass(frozen=True)
class Problem:
    """Leaves that require gradients, and a function of them."""

    x: torch.Tensor
    pairs: list[Pair]
    norm: Norm | None
    head_dim: int = 0
    """Width of the heads of the first two outputs, which are rotated; 0 for no rotation."""

    @property
    def rotary(self) -> Rotary | None:
        if not self.head_dim:
            return None
        return Rotary(*rope_tables(self.x.shape[-2], self.head_dim, 10_000.0, self.x.device))

    def leaves(self) -> list[torch.Tensor]:
        found = [self.x, *(t for pair in self.pairs for t in pair if t is not None)]
        return found if self.norm is None else [*found, self.norm.weight]

    def outputs(self, path: str) -> tuple[torch.Tensor, ...]:
        return lowdim_linears(self.x, self.pairs, self.norm, path, rotary=self.rotary)

    def outputs_and_gradients(self, path: str, seed: int = 7) -> list[torch.Tensor]:
        z = self.outputs(path)
        upstream = upstream_of(z, seed)
        return [*z, *torch.autograd.grad(z, self.leaves(), upstream)]


def upstream_of(z: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(part.shape, generator=generator).to(part) for part in z]


def draw(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    rank: int,
    widths: Sequence[int],
    biases: bool = True,
    norm: bool = False,
    seed: int = 0,
    device: torch.device = DEVICE,
    head_dim: int = 0,
) -> Problem:
    """Random factors whose products keep the scale of x, which has ``shape`` (..., d_in)."""
    generator = torch.Generator().manual_seed(seed)

    def new(*size: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        return values.to(device, dtype).requires_grad_()

    d_in = shape[-1]
    pairs = [
        Pair(
            new(rank, d_in, scale=d_in**-0.5),
            new(width, rank, scale=rank**-0.5),
            new(rank) if biases else None,
            new(width) if biases else None,
        )
        for width in widths
    ]
    return Problem(new(*shape), pairs, Norm(new(d_in), 1e-5) if norm else None, head_dim)


def turned(z: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotary embedding by complex numbers (RoFormer, section 3.2.1): entry e of a head and entry e + E/2 are
    one number, multiplied by exp(i * position / 10000^(2e/E))."""
    heads = z.unflatten(-1, (-1, 2, head_dim // 2))
    numbers = torch.complex(heads[..., 0, :], heads[..., 1, :])  # (..., S, heads, E/2)
    positions = torch.arange(z.shape[-2], dtype=torch.float64)[:, None, None]
    angles = positions * 10_000.0 ** (-2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    product = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.stack((product.real, product.imag), dim=-2).flatten(-3)


def reference(problem: Problem, seed: int = 7) -> list[torch.Tensor]:
    """Outputs and gradients in float64, written out, on the CPU."""
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in problem.leaves()]
    rest = iter(exact)
    x = next(rest)
    pairs = [Pair(*(None if t is None else next(rest) for t in pair)) for pair in problem.pairs]
    if problem.norm is not None:
        u = x * (x.square().mean(-1, keepdim=True) + problem.norm.eps).rsqrt() * next(rest)
    else:
        u = x
    z = [functional.linear(functional.linear(u, p.w_a, p.bias_a), p.w_b, p.bias_b) for p in pairs]
    if problem.head_dim:
        z[:2] = [turned(part, problem.head_dim) for part in z[:2]]
    # The same numbers as in ``outputs_and_gradients``, after their rounding there.
    upstream = [g.to(problem.x.dtype).double() for g in upstream_of(z, seed)]
    return [*(part.detach() for part in z), *torch.autograd.grad(z, exact, upstream)]


def assert_near(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape and one.dtype == dtype, (number, one.shape, one.dtype)
        exact = other.double()
        difference, size = (one.double().cpu() - exact).norm(), exact.norm()
        assert difference <= TOLERANCES[dtype] * size, (number, float(difference / size))  # NaN fails
