"""The projections of one attention layer in every way that is compared, their inputs, and their lower
bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks.kernel_timing import MAX_SETS, Ceilings, Setting, rotation
from megatron_lpa.kernels.tiles import FEW_TOKENS
from megatron_lpa.layers.sublayers import rope_tables
from megatron_lpa.ops.dispatch import Plan
from megatron_lpa.ops.products import Norm, Pair, Rotary, lowdim_by_plan, lowdim_linears

HEAD_DIM = 64
"""Of setting 2's models, which have rotary embedding."""

SEQUENCE = 4096
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Tokens, width of the stream, rank."""

    tokens: int
    width: int
    rank: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, d {self.width}, r {self.rank}"


PAPER = tuple(
    Shape(*numbers)
    for numbers in (
        (98304, 1024, 128), (81920, 768, 128), (98304, 1024, 256), (16384, 4096, 512), (98304, 1024, 64),
        (81920, 768, 256), (98304, 1024, 32),
    )
)  # fmt: skip
"""Tokens of the paper's global batches (of four sequences at width 4096), the most telling ones first."""

DECODE = tuple(
    Shape(tokens, width, rank) for width, rank in ((1024, 128), (4096, 512)) for tokens in (1, 16, 64)
)
DRY_PAPER = (Shape(18, 32, 8),)
DRY_DECODE = (Shape(1, 32, 8),)

LAYERNORM_WIDTHS = (4096,)
"""Of decoding sizes whose models have no RMSNorm and no rotary embedding."""

DECODE_SETS = 128
"""Copies of a decoding size's weights, at most."""


Around = tuple["Norm | None", "Rotary | None"]
"""What comes before q, k and v, and after q and k."""


@dataclass
class Inputs:
    """One set: x of q, k, v; y of o; the upstream gradients; the weights of q, k, v, o, low-dimensional and
    dense."""

    x: torch.Tensor
    y: torch.Tensor
    upstream: list[torch.Tensor]
    pairs: list[Pair]
    dense: list[torch.Tensor]


@dataclass
class Layer:
    """Sets to rotate among. Training sets share their weights, which a micro-batch reads from memory once
    whatever was before; decoding sets have their own, as a decoding step has been through all other layers
    since."""

    shape: Shape
    norm: Norm
    rotary: Rotary
    sets: list[Inputs]

    def around(self, normed: bool) -> Around:
        """A norm before and rotary embedding after, or neither."""
        return (self.norm, self.rotary) if normed else (None, None)

    def leaves(self, number: int, dense: bool, normed: bool) -> list[torch.Tensor]:
        """Everything that gets a gradient."""
        inputs = self.sets[number]
        weights = inputs.dense if dense else [t for pair in inputs.pairs for t in pair if t is not None]
        return [inputs.x, inputs.y, *weights, *([self.norm.weight] if normed else [])]


def make_layer(shape: Shape, setting: Setting) -> Layer:
    """Random weights and inputs."""
    new = functools.partial(torch.randn, device=setting.device, dtype=setting.dtype)
    d, r, tokens = shape.width, shape.rank, shape.tokens

    def leaf(*size: int) -> torch.Tensor:
        return (new(*size) / size[-1] ** 0.5).requires_grad_()

    def weights() -> tuple[list[Pair], list[torch.Tensor]]:
        return [Pair(leaf(r, d), leaf(d, r)) for _ in range(4)], [leaf(d, d) for _ in range(4)]

    rotary = Rotary(*rope_tables(math.gcd(tokens, SEQUENCE), min(HEAD_DIM, d // 2), 1e4, setting.device))
    length = rotary.cos.shape[0]
    size = (tokens // length, length, d)
    few = tokens <= FEW_TOKENS
    # The weights; or x, y, outputs and their gradients, which one forward and backward pass touches.
    touched = 8 * r * d if few else 10 * tokens * d
    count = rotation(touched * setting.dtype.itemsize, setting.dry, DECODE_SETS if few else MAX_SETS)
    shared = weights()
    sets = [
        Inputs(
            new(*size).requires_grad_(),
            new(*size).requires_grad_(),
            [new(*size) for _ in range(4)],
            *(weights() if few else shared),
        )
        for _ in range(count)
    ]
    return Layer(shape, Norm(leaf(d), EPS), rotary, sets)


def rotate(z: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (B, S, d) as public code writes it, with tables (S, E) in the dtype of z."""
    heads = z.unflatten(-1, (-1, cos.shape[-1]))
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (heads * cos.to(z.dtype).unsqueeze(1) + turned * sin.to(z.dtype).unsqueeze(1)).flatten(-2)


Projections = Callable[[torch.Tensor, Sequence[Any], Around], Sequence[torch.Tensor]]
"""``x`` is (B, S, d)."""


def separate(x: torch.Tensor, pairs: Sequence[Pair], around: Around) -> list[torch.Tensor]:
    """Two matrix products per pair, as public code has it."""
    return _plainly(
        x, around, [lambda u, p=p: functional.linear(functional.linear(u, p.w_a), p.w_b) for p in pairs]
    )


def dense(x: torch.Tensor, weights: Sequence[torch.Tensor], around: Around) -> list[torch.Tensor]:
    """One matrix product per projection."""
    return _plainly(x, around, [functools.partial(functional.linear, weight=weight) for weight in weights])


def _plainly(
    x: torch.Tensor, around: Around, products: Sequence[Callable[[torch.Tensor], torch.Tensor]]
) -> list[torch.Tensor]:
    norm, rotary = around
    if norm is not None:
        x = functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)
    z = [product(x) for product in products]
    if rotary is not None:
        z[:2] = [rotate(part, *rotary) for part in z[:2]]
    return z


def by_path(path: str) -> Projections:
    """Ours, on a path or as the shipped table says (``auto``)."""
    return lambda x, pairs, around: lowdim_linears(x, pairs, around[0], path, "auto", around[1])


def by_plans(qkv: Plan, o: Plan, qkv_forward: Plan, o_forward: Plan) -> Projections:
    """Ours by given plans: ``qkv`` for several pairs, ``o`` for one; the latter two without a backward
    pass."""

    def project(x: torch.Tensor, pairs: Sequence[Pair], around: Around) -> Sequence[torch.Tensor]:
        if torch.is_grad_enabled():
            return project_by_plan(qkv if len(pairs) > 1 else o, x, pairs, around)
        return project_by_plan(qkv_forward if len(pairs) > 1 else o_forward, x, pairs, around)

    return project


def project_by_plan(
    plan: Plan, x: torch.Tensor, pairs: Sequence[Pair], around: Around, elementwise: str = "auto"
) -> Sequence[torch.Tensor]:
    """As a model does it that has chosen a plan; what is not folded is computed as in a model, too."""
    norm, rotary = around
    return lowdim_by_plan(x, pairs, norm, plan, torch.is_grad_enabled(), elementwise, rotary)


def layer_function(project: Projections, layer: Layer, normed: bool) -> Callable[..., Any]:
    """(x, y, weights) -> q, k, v, o; with ``normed`` a norm before q, k, v, and rotary embedding of q and k
    after."""
    around = layer.around(normed)

    def run(x: torch.Tensor, y: torch.Tensor, weights: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        q, k, v = project(x, weights[:3], around)
        return q, k, v, project(y, weights[3:], (None, None))[0]

    return run


def forward_call(run: Callable[..., Any], layer: Layer, is_dense: bool) -> Callable[[int], Any]:
    """Forward without a graph, as in evaluation."""

    def call(number: int) -> Any:
        inputs = layer.sets[number]
        with torch.no_grad():
            return run(inputs.x, inputs.y, inputs.dense if is_dense else inputs.pairs)

    return call


def training_call(
    run: Callable[..., Any], layer: Layer, is_dense: bool, normed: bool
) -> Callable[[int], Any]:
    """Forward and backward, with gradients of inputs and weights."""

    def call(number: int) -> Any:
        inputs = layer.sets[number]
        outputs = run(inputs.x, inputs.y, inputs.dense if is_dense else inputs.pairs)
        return torch.autograd.grad(outputs, layer.leaves(number, is_dense, normed), inputs.upstream)

    return call


def bound_us(shape: Shape, ceilings: Ceilings, element_bytes: int, training: bool) -> float:
    """The least time of q, k, v, o: each operation costs the larger of its FLOPs and its bytes.

    x is read once for q, k and v, the latent is written where backward needs it, and one gradient of x is
    written. Norm and rotary embedding are not in it.
    """
    m, d, r = shape.tokens, shape.width, shape.rank

    def cost(flops: float, columns: float, weights: float) -> float:
        return 1e6 * max(flops / ceilings.flops, element_bytes * (m * columns + weights) / ceilings.bytes)

    total = 0.0
    for pairs in (3, 1):
        weights = 2.0 * pairs * r * d
        kept = pairs * r if training else 0
        total += cost(4.0 * m * d * r * pairs, d + kept + pairs * d, weights)
        if training:
            total += cost(4.0 * m * d * r * pairs, pairs * d + pairs * r + d, weights)
            total += cost(2.0 * m * d * r * pairs, pairs * r + d, weights / 2)
            total += pairs * cost(2.0 * m * d * r, r + d, r * d)
    return total
