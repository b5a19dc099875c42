"""What is counted on paper against what runs: bytes, FLOPs and launches of every path."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lpa.ops.lowdim_operator import Arguments, GradientArguments, compute, compute_gradients
from megatron_lpa.ops.products import Pair, linears, lowdim_linears
from megatron_lpa.planning import product_time
from megatron_lpa.planning.product_time import A800, H200, NEVER, Problem, least_joined_tokens, seconds

PROBLEMS = [
    Problem(64, 24, (8, 8, 8), (24, 24, 24), 4),
    Problem(40, 16, (4, 12), (8, 20), 4),
    Problem(40, 16, (6,), (20,), 4),
    Problem(40, 16, (4, 12), (8, 20), 4, training=False),
]


INSIDE = {
    torch.ops.megatron_lpa.lowdim.default: lambda *fields: compute(Arguments(*fields)),
    torch.ops.megatron_lpa.lowdim_backward.default: lambda *fields: compute_gradients(
        GradientArguments(*fields)
    ),
}


class Counted(TorchDispatchMode):
    """FLOPs of products, bytes of tensors read and written, launches. Views and allocations launch
    nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in INSIDE:
            with self:  # our own operator is not one launch: what it does is counted
                return INSIDE[function](*args)
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name in ("empty", "new_empty", "detach", "_unsafe_view"):
            return result
        tensors = {id(t): t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)}.values()
        if name in ("mm", "matmul", "linear", "addmm_"):
            left = args[1 if name == "addmm_" else 0]
            self.flops += 2 * result.numel() * left.shape[-1]
        self.launches += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        if name == "addmm_":  # what it adds to is read and written
            self.bytes += args[0].numel() * args[0].element_size()
        if (kwargs or {}).get("out") is not None:
            assert result is kwargs["out"]
        return result


def leaves_of(p: Problem, dense: bool) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=p.training)

    x = leaf(p.tokens, p.d_in)
    if dense:
        return x, [[leaf(w, p.d_in)] for w in p.widths]
    return x, [[leaf(r, p.d_in), leaf(w, r)] for r, w in zip(p.ranks, p.widths, strict=True)]


def counted(p: Problem, run: Callable[..., Any], dense: bool = False) -> tuple[int, int, int]:
    x, factors = leaves_of(p, dense)
    upstream = [torch.randn(p.tokens, w) for w in p.widths]
    with Counted() as found:
        z = run(x, factors)
        if p.training:
            torch.autograd.grad(z, [x, *itertools.chain(*factors)], upstream)
    return found.flops, found.bytes, found.launches


def on_paper(works: list[product_time.Work]) -> tuple[int, int, int]:
    return sum(w.flops for w in works), sum(w.memory_bytes for w in works), len(works)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("path", ["eager", "joined"])
def test_low_dimensional_products(problem: Problem, path: str) -> None:
    found = counted(problem, lambda x, pairs: lowdim_linears(x, [Pair(*pair) for pair in pairs], path=path))
    assert found == on_paper(getattr(product_time, path)(problem))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_dense_products(problem: Problem) -> None:
    weights = [None] * len(problem.widths)
    found = counted(problem, lambda x, w: linears(x, [one[0] for one in w], weights), dense=True)
    assert found == on_paper(product_time.dense_summed(problem))
    found = counted(problem, lambda x, w: tuple(functional.linear(x, one[0]) for one in w), dense=True)
    assert found == on_paper(product_time.dense_separate(problem))


SIZES = [
    Problem(tokens, d, (r,) * pairs, (d,) * pairs)
    for tokens, d, r, pairs in itertools.product(
        (512, 2048, 4096, 16384, 98304), (256, 768, 1024, 4096, 8192), (16, 32, 128, 256, 512, 1024), (2, 3)
    )
    if 2 * r < d
]


def test_joined_cannot_lose_where_it_is_chosen_without_a_measurement() -> None:
    chosen = [p for p in SIZES if p.tokens >= least_joined_tokens(p.d_in, p.ranks, p.widths, 2)]
    assert len(chosen) > len(SIZES) / 3
    for p in chosen:
        joined, eager = product_time.joined(p), product_time.eager(p)
        (flops, bytes_, launches), plain = on_paper(joined), on_paper(eager)
        assert flops == plain[0] and bytes_ < 0.9 * plain[1] and launches < plain[2], p
        # Also where products read x for nothing: the copies against the additions of gradients alone.
        copies = sum(w.memory_bytes for w in joined if not w.flops)
        additions = sum(w.memory_bytes for w in eager if not w.flops)
        assert copies <= additions / 2, p
        for rates in (H200, A800):
            assert seconds(joined, rates) < seconds(eager, rates), (p, rates)


def test_joined_cannot_lose_at_sizes_drawn_at_random() -> None:
    """Between the sizes that are tried the least time of a launch leaves steps in the times."""
    generator = random.Random(5)
    tried = 0
    for _ in range(3000):
        d, pairs = generator.choice((128, 256, 512, 768, 1024, 2048, 4096)), generator.choice((2, 3))
        ranks = (generator.choice((8, 32, 64, 128, 256, 512)),) * pairs
        widths = tuple(generator.choice((64, 128, 256, 512, 1024, 4096)) for _ in range(pairs))
        p = Problem(round(2 ** generator.uniform(9, 18)), d, ranks, widths)
        if p.tokens >= least_joined_tokens(d, ranks, widths, 2):
            tried += 1
            for rates in (H200, A800):
                assert seconds(product_time.joined(p), rates) < 1.005 * seconds(
                    product_time.eager(p), rates
                ), (p, rates)
    assert tried > 1000


def test_from_where_it_is_chosen() -> None:
    def least(d: int, ranks: tuple[int, ...]) -> int:
        return least_joined_tokens(d, ranks, (d,) * len(ranks), 2)

    assert least(1024, (128,)) == NEVER
    assert least(4096, (512,) * 3) == 6144
    assert least(1024, (256,) * 3) == 3072
    assert least(4096, (16,) * 2) == 512  # below, the weights are what counts
    # Small gradients take no longer to add than to launch the copies: more tokens than the margin asks for.
    assert 2048 < least(768, (256,) * 2) < 3000


def test_dense_gradients_summed_inside_products_cannot_lose_and_one_large_product_can() -> None:
    for p in SIZES:
        summed, separate, one = (
            on_paper(count(p))
            for count in (product_time.dense_summed, product_time.dense_separate, product_time.dense_joined)
        )
        assert summed[0] == separate[0] == one[0]
        assert summed[1] < separate[1] and summed[2] < separate[2]
        for rates in (H200, A800):
            assert seconds(product_time.dense_summed(p), rates) <= seconds(
                product_time.dense_separate(p), rates
            )
    for tokens, d in ((5120, 768), (7680, 1024), (6144, 1024), (16384, 4096)):  # the presets' micro-batches
        p = Problem(tokens, d, (1,) * 3, (d,) * 3)
        for rates in (H200, A800):
            assert seconds(product_time.dense_joined(p), rates) > seconds(product_time.dense_summed(p), rates)


def test_the_kernel_at_large_ranks_is_bound_by_what_it_reads_through_the_cache() -> None:
    """docs/kernels.md: 1.2 GB of factors and 0.6 GB of x at r 128; at r 512 it loses to two products."""
    forward = product_time.fused(Problem(98304, 1024, (128,) * 3, (1024,) * 3, training=False), 128, 128)[-1]
    written = 2 * 98304 * 3 * 1024
    assert forward.l2_bytes - written == pytest.approx(1.2e9 + 0.6e9, rel=0.02)
    large = Problem(16384, 4096, (512,) * 3, (4096,) * 3)
    assert seconds(product_time.fused(large, 64, 64), H200) > 1.5 * seconds(product_time.joined(large), H200)
