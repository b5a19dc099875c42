"""Several dense products of one x: against separate products in float64, and the operations that they
cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lpa.ops.products import linears


def drawn(
    dtype: torch.dtype, shape: tuple[int, ...], widths: list[int], biases: list[bool]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(3)

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    weights = [leaf(width, shape[-1]) for width in widths]
    return (
        leaf(*shape),
        weights,
        [leaf(w) if there else None for w, there in zip(widths, biases, strict=True)],
    )


def gradients(z: Any, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    upstream = [torch.randn(part.shape, generator=generator).to(part) for part in z]
    return torch.autograd.grad(z, leaves, upstream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (3, 0, 24)], ids=str)
@pytest.mark.parametrize(
    ("widths", "biases"), [([16, 8, 8], [True, True, True]), ([9, 17], [False, True]), ([5], [True])], ids=str
)
def test_outputs_and_every_gradient(
    dtype: torch.dtype, shape: tuple[int, ...], widths: list[int], biases: list[bool]
) -> None:
    x, weights, bias = drawn(dtype, shape, widths, biases)
    leaves = [x, *weights, *(b for b in bias if b is not None)]
    z = linears(x, weights, bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    there = iter(exact[1 + len(weights) :])
    expected = [
        functional.linear(exact[0], w, None if b is None else next(there))
        for w, b in zip(exact[1:], bias, strict=False)
    ]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1.2e-2}[dtype]
    for found, wanted in zip(
        [*z, *gradients(z, leaves)], [*expected, *gradients(expected, exact)], strict=True
    ):
        assert found.dtype == dtype and found.shape == wanted.shape
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def test_an_output_that_nobody_uses_and_inputs_that_need_no_gradient() -> None:
    x, weights, bias = drawn(torch.float64, (6, 8), [4, 4, 4], [True] * 3)
    z = linears(x, weights, bias)
    plain = functional.linear(x, weights[1], bias[1])
    assert torch.equal(*(torch.autograd.grad(part.sum(), x)[0] for part in (z[1], plain)))
    frozen = x.detach()
    z = linears(frozen, [w.detach() if n else w for n, w in enumerate(weights)], [None] * 3)
    assert z[0].requires_grad
    (found,) = torch.autograd.grad(z[0].sum() + z[2].sum(), weights[0])
    assert torch.allclose(found, frozen.sum(dim=0).expand(4, -1))


def test_the_gradient_of_x_is_summed_inside_the_products() -> None:
    x, weights, bias = drawn(torch.float32, (32, 8), [8, 8, 8], [False] * 3)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    seen: Counter[str] = Counter()
    with Count():
        gradients(linears(x, weights, bias), [x, *weights])
    assert seen["mm"] + seen["addmm_"] == 9 and seen["addmm_"] == 2 and seen["add"] + seen["add_"] == 0


def test_torch_compile_keeps_one_graph() -> None:
    x, weights, bias = drawn(torch.float32, (6, 8), [4, 12], [True, False])
    leaves = [x, *weights]
    z = torch.compile(linears, fullgraph=True, backend="aot_eager")(x, weights, bias)
    expected = linears(x, weights, bias)
    for found, wanted in zip(
        [*z, *gradients(z, leaves)], [*expected, *gradients(expected, leaves)], strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_backward_inside_autocast_after_a_forward_outside() -> None:
    x, weights, bias = drawn(torch.float32, (6, 8), [4, 12], [True, False])
    leaves = [x, *weights]
    z, expected = linears(x, weights, bias), linears(x, weights, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(z, leaves)
    assert all(torch.equal(one, other) for one, other in zip(found, gradients(expected, leaves), strict=True))


def test_outputs_may_be_written_to() -> None:
    x, weights, bias = drawn(torch.float64, (2, 3, 8), [4, 12], [True, False])
    z = linears(x, weights, bias)
    z[0].mul_(2)
    (found,) = torch.autograd.grad(z[0].sum(), bias[0])
    assert torch.equal(found, torch.full((4,), 12.0, dtype=torch.float64))


def test_autocast_casts_as_separate_products_do() -> None:
    x, weights, bias = drawn(torch.float32, (6, 8), [4, 12], [True, False])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = linears(x, weights, bias)
        expected = [functional.linear(x, w, b) for w, b in zip(weights, bias, strict=True)]
    assert [part.dtype for part in z] == [torch.bfloat16] * 2
    leaves = [x, *weights]
    for found, wanted in zip(
        [*z, *gradients(z, leaves)], [*expected, *gradients(expected, leaves)], strict=True
    ):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
