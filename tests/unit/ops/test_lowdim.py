"""The paths that are plain matrix products, and the registered operator, against float64."""

from __future__ import annotations

import pytest
import torch
from kernels.lowdim_cases import Problem, assert_near, draw, reference
from torch.nn import functional

from megatron_lpa.model.transformer import RMSNorm
from megatron_lpa.ops.dispatch import Plan
from megatron_lpa.ops.lowdim_math import inverse_rms
from megatron_lpa.ops.lowdim_operator import Arguments, lowdim, lowdim_operator
from megatron_lpa.ops.products import Norm, lowdim_by_plan, lowdim_linears

CPU = torch.device("cpu")
PATHS = ["auto", "eager", "joined"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_path_and_every_gradient(path: str, norm: bool, dtype: torch.dtype) -> None:
    problem = draw(dtype, (2, 9, 40), 12, [40, 24, 8], norm=norm, device=CPU)
    assert_near(problem.outputs_and_gradients(path), reference(problem), dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_rotary_embedding_on_every_path(path: str, norm: bool) -> None:
    problem = draw(torch.float64, (2, 9, 40), 12, [48, 24, 24], norm=norm, device=CPU, head_dim=8)
    # The tables are fp32, as in a model.
    for found, exact in zip(problem.outputs_and_gradients(path), reference(problem), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(5, 123), (1,), (2, 0, 24), (2, 3, 4, 24)], ids=str)
def test_any_leading_shape(path: str, shape: tuple[int, ...]) -> None:
    problem = draw(torch.float64, shape, 77, [45], device=CPU)
    assert_near(problem.outputs_and_gradients(path), reference(problem), torch.float64)


def test_pairs_of_different_ranks() -> None:
    first = draw(torch.float64, (7, 24), 5, [9], device=CPU)
    second = draw(torch.float64, (7, 24), 3, [11], biases=False, seed=1, device=CPU)
    both = Problem(first.x, first.pairs + second.pairs, None)
    assert_near(both.outputs_and_gradients("joined"), reference(both), torch.float64)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("path", ["eager", "joined"])
def test_gradcheck(path: str, norm: bool) -> None:
    problem = draw(torch.float64, (2, 3, 8), 3, [5, 4], norm=norm, device=CPU)
    leaves = problem.leaves()
    assert torch.autograd.gradcheck(lambda *_: problem.outputs(path), leaves)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
def test_norm_folded_into_products(biases: bool) -> None:
    """What the kernel falls back to where it has tiles for one direction only."""
    problem = draw(torch.float64, (2, 3, 8), 3, [5, 4], biases, norm=True, device=CPU)

    def run(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return lowdim_by_plan(problem.x, problem.pairs, problem.norm, Plan("fused"), True)

    assert torch.autograd.gradcheck(run, problem.leaves())
    torch.testing.assert_close(run(), problem.outputs("eager"))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_opcheck(norm: bool) -> None:
    problem = draw(torch.float32, (2, 5, 24), 5, [9, 9, 9], norm=norm, device=CPU)
    w_a, w_b, bias_a, bias_b = zip(*problem.pairs, strict=True)
    weight, eps = (None, 0.0) if problem.norm is None else problem.norm
    joined = torch.cat(bias_a).detach().requires_grad_()
    torch.library.opcheck(lowdim_operator, Arguments(problem.x, w_a, w_b, joined, list(bias_b), weight, eps))
    frozen = Arguments(problem.x.detach(), [w.detach() for w in w_a], [w.detach() for w in w_b], keep=False)
    torch.library.opcheck(lowdim_operator, frozen)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_registered_operator_and_what_is_inside_it_give_equal_bits(norm: bool, biases: bool) -> None:
    """Plain calls go past the operator; compiled and selectively checkpointed ones do not."""
    problem = draw(torch.float32, (2, 5, 24), 5, [9, 7, 9], biases, norm=norm, device=CPU)
    w_a, w_b, _, seconds = zip(*problem.pairs, strict=True)
    bias_a = torch.cat([p.bias_a for p in problem.pairs]) if biases else None
    bias_b = list(seconds) if biases else []
    weight, eps = (None, 0.0) if problem.norm is None else problem.norm
    arguments = Arguments(problem.x, w_a, w_b, bias_a, bias_b, weight, eps)
    z = lowdim_operator(*arguments)[:3]
    upstream = [torch.randn_like(part) for part in z]
    expected = torch.autograd.grad(z, problem.leaves(), upstream)
    direct = lowdim(arguments)
    found = torch.autograd.grad(direct, problem.leaves(), upstream)
    assert all(torch.equal(one, other) for one, other in zip([*z, *expected], [*direct, *found], strict=True))


class Layer(torch.nn.Module):
    def __init__(self, problem: Problem, path: str) -> None:
        super().__init__()
        self.problem, self.path = problem, path
        self.weights = torch.nn.ParameterList(t.detach() for t in problem.leaves()[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = list(self.weights)
        pairs = [type(p)(*flat[4 * i : 4 * i + 4]) for i, p in enumerate(self.problem.pairs)]
        return sum(lowdim_linears(x, pairs, Norm(flat[-1], 1e-5), self.path))


@pytest.mark.parametrize("path", ["auto", "joined"])
def test_torch_compile_keeps_one_graph_for_any_number_of_tokens(path: str) -> None:
    torch.compiler.reset()
    layer = Layer(draw(torch.float32, (2, 5, 24), 5, [9, 9, 9], norm=True, device=CPU), path)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 3, 700, 0):
        x = torch.randn(2, tokens, 24, requires_grad=True)
        z, plain = compiled(x), layer(x)
        torch.testing.assert_close(z, plain)
        upstream = torch.randn_like(z)
        leaves = [x, *layer.parameters()]
        found = torch.autograd.grad(z, leaves, upstream)
        torch.testing.assert_close(found, torch.autograd.grad(plain, leaves, upstream))


@pytest.mark.parametrize("path", PATHS)
def test_autocast(path: str) -> None:
    problem = draw(torch.float32, (2, 5, 24), 5, [9, 9, 9], device=CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = problem.outputs(path)
        plain = problem.outputs("eager")
    assert all(part.dtype == torch.bfloat16 for part in z)
    torch.testing.assert_close(z, plain, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad([part.float().square().sum() for part in z], problem.leaves())
    assert all(g.dtype == torch.float32 for g in gradients)


def test_autocast_leaves_fp64_alone() -> None:
    problem = draw(torch.float64, (3, 8), 2, [5, 5], device=CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert problem.outputs("joined")[0].dtype == torch.float64


def test_checkpointing_recomputes_the_same() -> None:
    path = "joined"
    problem = draw(torch.float32, (2, 5, 24), 5, [9, 9], norm=True, device=CPU)
    plain = problem.outputs_and_gradients(path)
    for reentrant in (False, True):
        z = torch.utils.checkpoint.checkpoint(
            lambda x: problem.outputs(path), problem.x, use_reentrant=reentrant
        )
        torch.testing.assert_close(list(z), plain[:2], rtol=0, atol=0)
        loss = sum((part * part.detach()).sum() for part in z)
        if reentrant:
            loss.backward()
            assert all(leaf.grad is not None for leaf in problem.leaves())
        else:
            torch.autograd.grad(loss, problem.leaves())


def test_without_gradients_no_latent_is_kept() -> None:
    problem = draw(torch.float32, (5, 24), 5, [9], device=CPU)
    w_a, w_b, _, _ = zip(*problem.pairs, strict=True)
    kept = lowdim_operator(*Arguments(problem.x, w_a, w_b))
    with torch.no_grad():
        left = lowdim_operator(*Arguments(problem.x, w_a, w_b, keep=False))
    assert kept[-2].shape == (5, 5) and left[-2].shape == (0,)


def test_one_gradient_and_no_more_than_needed() -> None:
    problem = draw(torch.float32, (5, 24), 5, [9, 9], device=CPU)
    for leaf in problem.leaves():
        leaf.requires_grad_(False)
    problem.pairs[1].w_b.requires_grad_()
    z = problem.outputs("joined")
    (gradient,) = torch.autograd.grad(z[1].sum(), problem.pairs[1].w_b)
    latent = functional.linear(problem.x, problem.pairs[1].w_a, problem.pairs[1].bias_a)
    torch.testing.assert_close(gradient, latent.sum(0).expand(9, -1))


def test_inverse_rms_is_the_norms() -> None:
    norm = RMSNorm(24, 1e-5)
    torch.nn.init.ones_(norm.weight)
    x = torch.randn(7, 24)
    torch.testing.assert_close(x * inverse_rms(x, 1e-5).unsqueeze(-1), norm(x))
