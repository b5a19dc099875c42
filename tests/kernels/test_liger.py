"""Liger-Kernel's functions as this package calls them. Only on a GPU: Triton's interpreter cannot run its
norms."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from kernels.lowdim_cases import DEVICE
from support.models import SETTING_2

from megatron_lpa.config import KernelConfig
from megatron_lpa.model.init import initialize
from megatron_lpa.model.recompute import recompute_for
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.ops import elementwise
from megatron_lpa.parallel.groups import ParallelGroups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
    ),
]

CASES = {
    "rms_norm": (lambda b, x, w: elementwise.rms_norm(x, w, 1e-5, b), [(3, 7, 48), (48,)]),
    "layer_norm": (lambda b, x, w, c: elementwise.layer_norm(x, w, c, 1e-5, b), [(3, 7, 48), (48,), (48,)]),
    "swiglu": (lambda b, g, u: elementwise.swiglu(g, u, b), [(3, 7, 48), (3, 7, 48)]),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_eager_in_float64(
    case: str, dtype: torch.dtype, tolerance: float
) -> None:
    function, shapes = CASES[case]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    upstream = torch.randn(shapes[0], device=DEVICE).to(dtype)
    kept = upstream.clone()
    y, expected = function("liger", *inputs), function("eager", *exact)
    found = [y, *torch.autograd.grad(y, inputs, upstream)]
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    assert torch.equal(upstream, kept)  # other readers of the same gradient follow
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_decoder_trains_as_with_eager(mode: str) -> None:
    """Its gradients under checkpointing too: some of Liger's functions write into their inputs."""
    results = []
    for kernels in (KernelConfig(elementwise="eager"), KernelConfig(elementwise="liger", loss="chunked")):
        decoder = Decoder(SETTING_2, ParallelGroups.single(), "latent", recompute_for(mode), kernels)
        initialize(decoder, SETTING_2, ParallelGroups.single(), 3)
        decoder.to(DEVICE)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(SETTING_2.vocab_size, (2, 13), generator=generator).to(DEVICE)
        losses = decoder(ids[:, :-1], ids[:, 1:])
        losses.mean().backward()
        results.append([losses.detach(), *(p.grad for p in decoder.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
