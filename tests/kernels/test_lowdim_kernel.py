"""The two-product kernel against float64: in Triton's interpreter on the CPU, compiled where there is a
GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernels.lowdim_cases import DEVICE, Problem, assert_near, draw, reference

from megatron_lpa.kernels import launch
from megatron_lpa.kernels.tiles import Tile
from megatron_lpa.ops.lowdim_operator import Arguments, lowdim_operator
from megatron_lpa.ops.products import Pair, lowdim_linear, lowdim_linears
from megatron_lpa.planning import product_time

KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tile(16, 32, 16, 4, 1)

every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def test_this_runs_where_it_should() -> None:
    assert launch.runs_under_interpreter() != torch.cuda.is_available()


@every_dtype
@pytest.mark.parametrize(
    ("shape", "rank", "width"),
    [((5, 123), 77, 45), ((3, 7, 64), 16, 32), ((1, 1), 1, 1), ((33, 40), 3, 130)],
    ids=str,
)
def test_one_pair_and_every_gradient(
    dtype: torch.dtype, shape: tuple[int, ...], rank: int, width: int
) -> None:
    problem = draw(dtype, shape, rank, [width])
    assert_near(problem.outputs_and_gradients("fused"), reference(problem), dtype)


@every_dtype
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize("widths", [[40, 24, 8], [17, 17]], ids=str)
def test_several_pairs_and_every_gradient(dtype: torch.dtype, widths: list[int], biases: bool) -> None:
    problem = draw(dtype, (2, 9, 40), 12, widths, biases)
    assert_near(problem.outputs_and_gradients("fused"), reference(problem), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize("pairs", [1, 3])
def test_norm_folded_in(dtype: torch.dtype, biases: bool, pairs: int) -> None:
    problem = draw(dtype, (2, 9, 40), 12, [24] * pairs, biases, norm=True)
    assert_near(problem.outputs_and_gradients("fused"), reference(problem), dtype)


@every_dtype
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("shape", "widths", "head_dim"),
    [
        ((2, 9, 40), [48, 24, 24], 8),
        ((19, 40), [60, 36, 12], 12),
        ((2, 3, 5, 24), [64, 64, 64], 64),
        ((1, 6, 24), [4, 2], 2),
    ],
    ids=str,
)  # fmt: skip
def test_rotary_embedding_after(
    dtype: torch.dtype, norm: bool, shape: tuple[int, ...], widths: list[int], head_dim: int
) -> None:
    """Heads of any even width, also fewer key heads, and a third output that stays as it is."""
    problem = draw(dtype, shape, 12, widths, norm=norm, head_dim=head_dim)
    assert_near(problem.outputs_and_gradients("fused"), reference(problem), dtype)


def test_rotation_leaves_the_third_output_alone() -> None:
    """Bit by bit, also beside a neighbour that is infinite."""
    problem = draw(torch.float32, (5, 24), 4, [16, 16, 16], biases=False, head_dim=8)
    problem.pairs[2].w_b.data[0] = float("inf")
    plain = replace(problem, head_dim=0)
    found, expected = problem.outputs("fused"), plain.outputs("fused")
    assert not torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("x_times", [1e30, 1e-18], ids=["huge", "tiny"])
def test_norm_of_extreme_rows(x_times: float) -> None:
    """The mean square leaves fp32's range; what PyTorch's own norm makes of it, the kernel makes too."""
    problem = draw(torch.float32, (6, 40), 12, [24], norm=True)
    scaled = Problem((problem.x * x_times).detach().requires_grad_(), problem.pairs, problem.norm)
    found, plain = scaled.outputs("fused"), scaled.outputs("eager")
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@every_dtype
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 40), (5, 1024), (2, 4099), (700, 16)])
def test_inverse_rms_of_rows(dtype: torch.dtype, tokens: int, width: int) -> None:
    """The pass before large tiles: any width, rows of zeros, huge and tiny rows, rows that are not
    contiguous."""
    x = torch.randn(tokens, width, device=DEVICE)
    x[0] *= 0 if tokens > 2 else 1e4
    x[-1] *= 1e-3
    x = x.to(dtype)
    expected = 1 / (x.double().square().mean(-1) + 1e-6).sqrt()
    for view in (x, x.T.contiguous().T, torch.cat([x, x], dim=-1)[:, :width]):
        rstd = torch.full((tokens,), float("nan"), device=DEVICE)
        launch.inverse_rms(view, 1e-6, rstd)
        torch.testing.assert_close(rstd.double(), expected, rtol=1e-6, atol=0)


def test_three_pairs_equal_three_calls_bit_by_bit() -> None:
    problem = draw(torch.bfloat16, (19, 48), 16, [32, 48, 16])
    together = problem.outputs("fused")
    for pair, z in zip(problem.pairs, together, strict=True):
        assert torch.equal(lowdim_linear(problem.x, *pair, path="fused"), z)


def test_repeated_runs_give_equal_bits() -> None:
    problem = draw(torch.bfloat16, (37, 48), 16, [32, 48, 16], norm=True, head_dim=16)
    first, second = (problem.outputs_and_gradients("fused") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :1].expand(-1, 6, -1),
        lambda x: x[..., ::2],
        lambda x: x[0].T[:8].T,
        lambda x: x.flip(0)[:, 1:],
    ],
    ids=["rows", "transposed", "broadcast", "columns", "column-major", "offset"],
)
def test_strided_x(view) -> None:
    base = torch.randn(4, 6, 48, device=DEVICE, requires_grad=True)
    x = view(base)
    problem = draw(torch.float32, tuple(x.shape), 5, [9, 9])
    strided = Problem(x, problem.pairs, None)
    copied = Problem(x.detach().clone().requires_grad_(), problem.pairs, None)
    assert_near(strided.outputs_and_gradients("fused"), reference(copied), torch.float32)


def test_strided_weights_and_gradients() -> None:
    problem = draw(torch.float32, (11, 24), 6, [20, 20])
    turned = [Pair(p.w_a.T.contiguous().T, p.w_b.T.contiguous().T, p.bias_a, p.bias_b) for p in problem.pairs]
    z = lowdim_linears(problem.x, turned, path="fused")
    # The upstream gradients are columns of one tensor, as attention hands them back.
    upstream = torch.randn(11, 40, device=DEVICE)
    found = torch.autograd.grad(torch.cat(z, dim=-1), problem.leaves(), upstream)
    plain = torch.autograd.grad(torch.cat(problem.outputs("eager"), dim=-1), problem.leaves(), upstream)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_zero_tokens() -> None:
    problem = draw(torch.float32, (3, 0, 24), 5, [9, 9, 9], norm=True)
    *z, _ = problem.outputs_and_gradients("fused")
    assert [part.shape for part in z[:3]] == [(3, 0, 9)] * 3
    assert all(not g.any() for g in z[4:])  # of the weights


@every_dtype
def test_huge_values_overflow_as_two_products_do(dtype: torch.dtype) -> None:
    problem = draw(dtype, (6, 40), 8, [16], biases=False)
    top = torch.finfo(dtype).max
    x = (problem.x / problem.x.abs().max() * top / 4).detach().requires_grad_()
    x.data[0] = 0
    x.data[1, 0] = float("nan")
    huge = Problem(x, problem.pairs, None)
    found, plain = huge.outputs("fused")[0], huge.outputs("eager")[0]
    assert torch.equal(found.isfinite().all(-1), plain.isfinite().all(-1))
    assert not found[0].any() and found[1].isnan().all()
    finite = plain.isfinite() & found.isfinite()
    scale = float(plain[finite].abs().max().detach())
    torch.testing.assert_close(found[finite] / scale, plain[finite] / scale, rtol=2e-2, atol=2e-2)


def test_gradients_of_fewer_inputs() -> None:
    problem = draw(torch.float32, (7, 24), 5, [9, 9])
    for leaf in problem.leaves():
        leaf.requires_grad_(False)
    assert not any(z.requires_grad for z in problem.outputs("fused"))
    for leaf in (problem.x, problem.pairs[1].w_b, problem.pairs[0].bias_a):
        assert leaf is not None
        leaf.requires_grad_()
        gradients = [
            torch.autograd.grad(sum(z.sum() for z in problem.outputs(path)), leaf)[0]
            for path in ("fused", "eager")
        ]
        torch.testing.assert_close(*gradients)
        leaf.requires_grad_(False)


@pytest.mark.parametrize(
    "tile",
    [
        Tile(16, 16, 16, 4, 1, 4),
        Tile(32, 16, 64, 4, 2, 16),
        Tile(64, 64, 16, 8, 3, 3),
        Tile(16, 64, 128, 4, 2, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("norm", "head_dim"), [(False, 0), (True, 0), (True, 8)], ids=["plain", "norm", "norm and rotary"]
)
def test_any_tile_gives_the_same(tile: Tile, norm: bool, head_dim: int) -> None:
    """Also tiles larger than the matrices, and more splits than columns."""
    problem = draw(torch.float32, (35, 40), 12, [24, 40], norm=norm, head_dim=head_dim)
    w_a, w_b, bias_a, bias_b = zip(*problem.pairs, strict=True)
    weight, eps = (None, 0.0) if problem.norm is None else problem.norm
    arguments = Arguments(
        problem.x, w_a, w_b, torch.cat(bias_a), list(bias_b), weight, eps, True, str(tile), str(tile)
    )
    cos, sin = problem.rotary or (None, None)
    *z, _, _ = lowdim_operator(*arguments._replace(cos=cos, sin=sin))
    torch.manual_seed(0)
    upstream = [torch.randn_like(part) for part in z]
    plain = problem.outputs("eager")
    torch.testing.assert_close(z, list(plain), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(z, problem.leaves(), upstream)
    torch.testing.assert_close(
        found, torch.autograd.grad(plain, problem.leaves(), upstream), rtol=1e-5, atol=1e-4
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads and writes are counted in the interpreter")
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("pairs", [1, 3])
def test_programs_read_and_write_what_the_cost_model_counts(
    pairs: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes through the L2 cache, counted element by element; 40 tokens leave the last tile half empty."""
    from triton.runtime.interpreter import interpreter_builder

    counted = [0, 0]
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def counting_load(ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        counted[0] += int(np.count_nonzero(mask.data))
        return load(ptrs, mask, other, *rest)

    def counting_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counted[1] += int(np.count_nonzero(mask.data))
        return store(ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", counting_load)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", counting_store)
    tokens, width, rank = 40, 48, 12
    problem = draw(torch.float32, (tokens, width), rank, [width] * pairs, biases=False)
    works = product_time.fused(
        product_time.Problem(tokens, width, (rank,) * pairs, (width,) * pairs, 4), rows, rows
    )
    forward, backward = (work for work in works if work.l2_bytes)
    tile = Tile(rows, 16, 16, 4, 1)
    w_a, w_b = ([pair[n].detach() for pair in problem.pairs] for n in (0, 1))
    x = problem.x.detach()
    z, *_ = launch.forward(x, torch.cat(w_a), w_b, None, [None] * pairs, tile, keep=True)
    assert 4 * sum(counted) == forward.l2_bytes
    counted[:] = [0, 0]
    launch.input_gradient(z, torch.cat(w_a), w_b, tile)
    assert 4 * sum(counted) == backward.l2_bytes


def test_every_output_element_is_written() -> None:
    """Memory that the kernel is handed may hold anything: here NaN, which no later test would forgive."""
    problem = draw(torch.float32, (19, 24), 5, [8, 32], norm=True, head_dim=8)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for tensor in problem.outputs_and_gradients("fused"):
            assert tensor.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("norm", "head_dim"), [(False, 0), (True, 0), (True, 4)], ids=["plain", "norm", "norm and rotary"]
)
def test_opcheck(norm: bool, head_dim: int) -> None:
    problem = draw(torch.float32, (2, 5, 24), 5, [8, 8, 8], norm=norm, head_dim=head_dim)
    w_a, w_b, bias_a, bias_b = zip(*problem.pairs, strict=True)
    weight, eps = (None, 0.0) if problem.norm is None else problem.norm
    joined = torch.cat(bias_a).detach().requires_grad_()
    arguments = Arguments(
        problem.x, w_a, w_b, joined, list(bias_b), weight, eps, True, str(SMALL), str(SMALL)
    )
    cos, sin = problem.rotary or (None, None)
    torch.library.opcheck(lowdim_operator, arguments._replace(cos=cos, sin=sin))


def test_torch_compile_keeps_one_graph() -> None:
    problem = draw(torch.float32, (2, 5, 24), 5, [8, 8, 8], norm=True, head_dim=4)
    compiled = torch.compile(lowdim_linears, fullgraph=True, backend="aot_eager")
    z = compiled(problem.x, problem.pairs, problem.norm, "fused", rotary=problem.rotary)
    found = torch.autograd.grad(z[0].sum() + z[2].sum(), problem.leaves(), allow_unused=True)
    plain = problem.outputs("fused")
    expected = torch.autograd.grad(plain[0].sum() + plain[2].sum(), problem.leaves(), allow_unused=True)
    torch.testing.assert_close(z, plain, rtol=0, atol=0)
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:  # the second pair takes no part; compiled code may say zero
            assert all(g is None or not g.any() for g in (one, other))
        else:
            assert torch.equal(one, other)


def test_autocast_and_checkpointing() -> None:
    problem = draw(torch.float32, (2, 5, 24), 5, [9, 9, 9])
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        z = torch.utils.checkpoint.checkpoint(problem.outputs, "fused", use_reentrant=False)
        plain = problem.outputs("eager")
    assert all(part.dtype == torch.bfloat16 for part in z)
    torch.testing.assert_close(z, plain, rtol=2e-2, atol=2e-2)
    upstream = [torch.randn_like(part) for part in z]
    found = torch.autograd.grad(z, problem.leaves(), upstream)
    expected = torch.autograd.grad(plain, problem.leaves(), upstream)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 1.2e-2 * other.norm()
