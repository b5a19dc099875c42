"""What only a GPU shows: real tiles and sizes, tf32, compiled graphs. ``python -m pytest -m gpu`` runs
these."""

from __future__ import annotations

import pytest
import torch
from kernels.lowdim_cases import Problem, assert_near, draw, reference, upstream_of

from megatron_lpa.errors import UserError
from megatron_lpa.kernels.tiles import Tile, candidates, default_tile, why_not
from megatron_lpa.ops.dispatch import LEAST_ROWS
from megatron_lpa.ops.lowdim_operator import Arguments, lowdim_operator
from megatron_lpa.ops.products import Norm, Pair, lowdim_linears

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]
PAPER = [(768, 128), (768, 256), (1024, 32), (1024, 64), (1024, 128), (1024, 256)]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [
        float((one.double() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)
    ]


def exact_on_gpu(problem: Problem, seed: int = 7) -> list[torch.Tensor]:
    """Outputs and gradients in float64 by the eager path, which the CPU tests hold to the formula."""
    leaves = iter([leaf.detach().double().requires_grad_() for leaf in problem.leaves()])
    x = next(leaves)
    pairs = [Pair(*(None if t is None else next(leaves) for t in pair)) for pair in problem.pairs]
    norm = None if problem.norm is None else Norm(next(leaves), problem.norm.eps)
    exact = Problem(x, pairs, norm, problem.head_dim)
    z = exact.outputs("eager")
    # The same numbers as in ``outputs_and_gradients``, after their rounding there.
    upstream = [g.to(problem.x.dtype).double() for g in upstream_of(z, seed)]
    return [*(part.detach() for part in z), *torch.autograd.grad(z, exact.leaves(), upstream)]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize(("width", "rank"), PAPER)
def test_no_worse_than_the_eager_path(
    width: int, rank: int, pairs: int, norm: bool, dtype: torch.dtype
) -> None:
    """Errors against float64 next to those of two cuBLAS products, which round at the same places."""
    # With the norm also rotary embedding after, as in setting 2.
    head_dim = 64 if norm and pairs > 1 else 0
    problem = draw(dtype, (4, 257, width), rank, [width] * pairs, norm=norm, device=GPU, head_dim=head_dim)
    exact = exact_on_gpu(problem)
    eager = errors(problem.outputs_and_gradients("eager"), exact)
    floor = 1e-6 if dtype == torch.float32 else 1e-3
    tile = default_tile(4 * 257, rank, 1, dtype.itemsize, torch.cuda.get_device_capability(), head_dim > 0)
    paths = ["joined"]
    if tile is not None and tile.block_m >= LEAST_ROWS:
        paths.append("fused")
    else:  # as in fp32 at r = 256: no tile is large enough for the kernel to be any use, and it says so
        with pytest.raises(UserError, match="no tile of 64 rows or more"):
            problem.outputs("fused")
    for path in paths:
        found = errors(problem.outputs_and_gradients(path), exact)
        # The folded norm rounds the product of weights, the eager one the normed x.
        told = (path, found, eager)
        assert all(one <= 2.0 * other + floor for one, other in zip(found, eager, strict=True)), told


def test_large_rank() -> None:
    problem = draw(torch.bfloat16, (512, 4096), 512, [4096], biases=False, device=GPU)
    exact = exact_on_gpu(problem)
    eager = errors(problem.outputs_and_gradients("eager"), exact)
    found = errors(problem.outputs_and_gradients("fused"), exact)
    assert all(one <= 2.0 * other + 1e-3 for one, other in zip(found, eager, strict=True))


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 300])
def test_few_tokens(tokens: int) -> None:
    problem = draw(torch.bfloat16, (tokens, 1024), 128, [1024, 1024, 1024], device=GPU)
    for path in ("fused", "joined"):
        assert_near(problem.outputs_and_gradients(path), reference(problem), torch.bfloat16)


@pytest.mark.parametrize("tile", [t for t in candidates(10**6) if t.block_m >= 64], ids=str)
def test_every_candidate_tile(tile: Tile) -> None:
    capability = torch.cuda.get_device_capability()
    problem = draw(torch.bfloat16, (700, 768), 128, [768, 768, 512], norm=True, device=GPU, head_dim=64)
    reasons = [why_not(tile, 128, latents, 2, capability, latents == 1) for latents in (1, 3)]
    if reasons[0]:
        pytest.skip(reasons[0])
    w_a, w_b, bias_a, bias_b = zip(*problem.pairs, strict=True)
    assert problem.norm is not None
    backward = "" if reasons[1] else str(tile)
    arguments = Arguments(
        problem.x, w_a, w_b, torch.cat(bias_a), list(bias_b), *problem.norm, True, str(tile), backward,
        *problem.rotary, "auto",
    )  # fmt: skip
    *z, _, _ = lowdim_operator(*arguments)
    plain = problem.outputs("eager")
    for one, other in zip(z, plain, strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()
    upstream = [torch.randn_like(part) for part in z]
    found = torch.autograd.grad(z, problem.leaves(), upstream)
    for one, other in zip(found, torch.autograd.grad(plain, problem.leaves(), upstream), strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()


def test_equal_bits_at_full_size() -> None:
    """A race would move the sums; several runs over all multiprocessors."""
    problem = draw(torch.bfloat16, (20000, 1024), 128, [1024] * 3, norm=True, device=GPU)
    first = problem.outputs_and_gradients("fused")
    for _ in range(4):
        again = problem.outputs_and_gradients("fused")
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_rows_beyond_31_bits() -> None:
    tokens, width = 2**31 // 1024 + 77, 1024
    x = torch.randn(tokens, width, device=GPU, dtype=torch.bfloat16)
    problem = draw(torch.bfloat16, (1, width), 32, [width], biases=False, device=GPU)
    with torch.no_grad():
        z = lowdim_linears(x, problem.pairs, path="fused")[0]
        tail = lowdim_linears(x[-200:].clone(), problem.pairs, path="eager")[0]
    assert (z[-200:] - tail).norm() <= 2e-2 * tail.norm()


@pytest.mark.parametrize("path", ["fused", "joined"])
def test_fp32_uses_tf32_only_where_pytorch_does(path: str) -> None:
    problem = draw(torch.float32, (512, 1024), 128, [1024], norm=True, device=GPU)
    exact = exact_on_gpu(problem)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert max(errors(problem.outputs_and_gradients(path), exact)) < 5e-6
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert 5e-5 < max(errors(problem.outputs_and_gradients(path), exact)) < 2e-3
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def assert_compiles_one_graph(path: str, backend: str) -> None:
    # Tokens enough for "auto" to take joined products without a table.
    problem = draw(torch.bfloat16, (4, 512, 768), 128, [768] * 3, norm=True, device=GPU, head_dim=64)
    compiled = torch.compile(lowdim_linears, fullgraph=True, backend=backend)
    z = compiled(problem.x, problem.pairs, problem.norm, path, rotary=problem.rotary)
    plain = problem.outputs("eager")
    for one, other in zip(z, plain, strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()
    upstream = [torch.randn_like(part) for part in z]
    found = torch.autograd.grad(z, problem.leaves(), upstream)
    for one, other in zip(found, torch.autograd.grad(plain, problem.leaves(), upstream), strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()


@pytest.mark.parametrize("path", ["auto", "joined", "fused"])
def test_tracing_finds_one_graph(path: str) -> None:
    """With a backend that compiles nothing: what a tuning table waits for has to be quick."""
    assert_compiles_one_graph(path, "aot_eager")


def test_inductor_compiles_one_graph() -> None:
    """The GPU suite runs this one apart from the others (``benchmarks/suite_tests.py``), by its name."""
    assert_compiles_one_graph("fused", "inductor")


def test_cuda_graphs_capture_the_kernel() -> None:
    problem = draw(torch.bfloat16, (16, 1024), 128, [1024] * 3, device=GPU)
    with torch.no_grad():
        for _ in range(3):
            expected = problem.outputs("fused")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = problem.outputs("fused")
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


def test_launches_do_not_synchronise() -> None:
    problem = draw(torch.bfloat16, (2048, 1024), 128, [1024] * 3, norm=True, device=GPU)
    upstream = [torch.randn_like(z) for z in problem.outputs("fused")]
    torch.autograd.grad(problem.outputs("fused"), problem.leaves(), upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(problem.outputs("fused"), problem.leaves(), upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
