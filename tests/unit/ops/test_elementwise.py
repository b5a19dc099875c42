"""Backends of norms, rotation and SwiGLU: outputs and every gradient against formulas in float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from support import reference
from torch._dynamo.utils import counters

from megatron_lpa.errors import UserError
from megatron_lpa.layers.sublayers import rope_tables
from megatron_lpa.ops import elementwise

EPS = 1e-5
HEAD = 8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}
Function = Callable[..., tuple[torch.Tensor, ...]]


def rms(backend: str) -> Function:
    return lambda x, w: (elementwise.rms_norm(x, w, EPS, backend),)


def layer(backend: str) -> Function:
    return lambda x, w, b: (elementwise.layer_norm(x, w, b, EPS, backend),)


def gated(backend: str) -> Function:
    return lambda gate, up: (elementwise.swiglu(gate, up, backend),)


def rotated(backend: str) -> Function:
    def function(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return elementwise.rotate(q, k, *rope_tables(q.shape[1], HEAD, 100.0, q.device), backend)

    return function


def exact_rms(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * w,)


def exact_layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    centred = x - x.mean(-1, keepdim=True)
    return (centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPS) * w + b,)


def exact_gated(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (gate / (1 + torch.exp(-gate)) * up,)


def exact_rotated(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(reference.rotate(t.transpose(1, 2), 100.0).transpose(1, 2) for t in (q, k))


CASES = {
    "rms_norm": (rms, exact_rms, [(2, 5, 24), (24,)]),
    "layer_norm": (layer, exact_layer, [(2, 5, 24), (24,), (24,)]),
    "swiglu": (gated, exact_gated, [(2, 5, 24), (2, 5, 24)]),
    "rotate": (rotated, exact_rotated, [(2, 5, 4, HEAD), (2, 5, 2, HEAD)]),
}
cases = pytest.mark.parametrize("case", CASES)


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(2 * torch.randn(shape) + 0.5).to(dtype).requires_grad_() for shape in shapes]


def outputs_and_gradients(function: Function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs = function(*inputs)
    torch.manual_seed(1)
    upstream = [torch.randn(o.shape).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@cases
def test_outputs_and_gradients_equal_the_formula(case, dtype, backend):
    make, exact, shapes = CASES[case]
    inputs = draw(shapes, dtype)
    found = outputs_and_gradients(make(backend), inputs)
    expected = outputs_and_gradients(exact, [t.detach().double().requires_grad_() for t in inputs])
    tolerance = TOLERANCE[dtype]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        if case == "rotate" and dtype == torch.float64:
            tolerance = 1e-6  # the tables are fp32
        error = (one.double() - other).norm() / other.norm()
        assert error < tolerance, (case, float(error))


@cases
def test_compiled_takes_views_with_strides(case):
    make, _, shapes = CASES[case]
    wide = [torch.randn(*shape[:-1], 2 * shape[-1]) for shape in shapes]
    views = [t[..., : t.shape[-1] // 2].requires_grad_() for t in wide]
    dense = [t.detach().clone().contiguous().requires_grad_() for t in views]
    found = outputs_and_gradients(make("compiled"), views)
    for one, other in zip(found, outputs_and_gradients(make("eager"), dense), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@cases
def test_no_shape_of_training_or_evaluation_compiles_again(case, fresh_compiler):
    """One graph forward, one backward: not per micro-batch, sequence length, pass or weight tensor."""
    make, _, shapes = CASES[case]
    function = make("compiled")
    for batch, length in ((2, 5), (3, 7), (4, 16), (2, 9), (5, 3), (7, 11), (2, 31), (3, 2), (9, 8), (2, 6)):
        sized = [(batch, length, *shape[2:]) if len(shape) > 1 else shape for shape in shapes]
        inputs = draw(sized, torch.float32)
        outputs_and_gradients(function, inputs)
        with torch.no_grad():
            function(*inputs)
    assert counters["stats"]["unique_graphs"] == 2


def test_swiglu_and_norms_keep_what_they_say():
    def kept(function: Function, inputs: list[torch.Tensor]) -> int:
        given = {t.untyped_storage().data_ptr() for t in inputs}
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = function(*inputs)
        assert output[0].requires_grad
        return sum(sizes.values())

    x, w, b = draw([(2, 64, 32), (32,), (32,)], torch.float32)
    rows = 2 * 64
    assert kept(gated("compiled"), [x, x.detach().clone().requires_grad_()]) == 0
    assert kept(rms("compiled"), [x, w]) == 4 * rows
    assert kept(layer("compiled"), [x, w, b]) == 2 * 4 * rows
    q = x.detach().view(2, 32, 8, HEAD).requires_grad_()
    assert kept(rotated("compiled"), [q, q.detach().clone().requires_grad_()]) == 2 * 4 * 32 * HEAD


def test_auto_is_eager_on_a_cpu():
    assert elementwise.resolve("auto", torch.zeros(1)) == "eager"


def test_inside_a_compiled_graph_nothing_is_compiled_apart(fresh_compiler):
    x, w = draw([(4, 24), (24,)], torch.float32)
    y = torch.compile(lambda a, b: elementwise.rms_norm(a, b, EPS, "compiled") + 1, fullgraph=True)(x, w)
    torch.testing.assert_close(y, exact_rms(x, w)[0] + 1)
    assert counters["stats"]["unique_graphs"] == 1


def test_liger_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    elementwise._check_liger.cache_clear()
    with pytest.raises(
        UserError, match=r"needs a GPU, but the model is on cpu; set kernels.elementwise=auto"
    ):
        elementwise.resolve("liger", torch.zeros(1))


def test_liger_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elementwise._check_liger.cache_clear()
    with pytest.raises(UserError, match=r"needs the package liger-kernel: pip install 'megatron_lpa\[gpu\]'"):
        elementwise.resolve("liger", torch.zeros(1))
