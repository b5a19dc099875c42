"""The loss that computes the head's product chunk by chunk, and what both kinds keep and allocate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import MODELS
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lpa.config import KernelConfig
from megatron_lpa.config.kernels import most_whole_logits_bytes
from megatron_lpa.layers import cross_entropy
from megatron_lpa.layers.cross_entropy import chunked_cross_entropy, vocab_parallel_cross_entropy
from megatron_lpa.model.transformer import LanguageModelHead
from megatron_lpa.parallel.groups import ParallelGroups

SINGLE = ParallelGroups.single()
BATCH, LENGTH, WIDTH, IDS, REAL = 3, 7, 16, 40, 37
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(dtype: torch.dtype, bias: bool) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    inputs = [normal(BATCH, LENGTH, WIDTH), normal(IDS, WIDTH), normal(IDS) if bias else None]
    if bias:
        with torch.no_grad():
            inputs[2][REAL:] = 1e4  # padded ids would win every prediction
    return inputs, torch.randint(REAL, (BATCH, LENGTH), generator=generator)


def with_gradients(losses: torch.Tensor, inputs: list[torch.Tensor | None]) -> list[torch.Tensor]:
    upstream = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype).view(losses.shape)
    return [losses, *torch.autograd.grad(losses, [t for t in inputs if t is not None], upstream)]


def exact(inputs: list[torch.Tensor | None], labels: torch.Tensor) -> list[torch.Tensor]:
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    scores = functional.linear(*wide)[..., :REAL]
    losses = functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none")
    return with_gradients(losses.view(labels.shape), wide)


@pytest.mark.parametrize(
    ("backend", "tokens"), [("eager", 1), ("eager", 4), ("eager", 21), ("eager", 1000), ("compiled", 4)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["whole", "chunked"])
def test_losses_and_gradients_equal_torch(kind, dtype, bias, tokens, backend, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOSS_CHUNK_BYTES", tokens * IDS * max(4, dtype.itemsize))
    inputs, labels = draw(dtype, bias)
    if kind == "chunked":
        losses = chunked_cross_entropy(*inputs, labels, SINGLE, REAL, backend)
    else:
        losses = vocab_parallel_cross_entropy(functional.linear(*inputs), labels, SINGLE, REAL, backend)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for found, expected in zip(with_gradients(losses, inputs), exact(inputs, labels), strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], float(error)
    grads = with_gradients(chunked_cross_entropy(*inputs, labels, SINGLE, REAL, backend), inputs)[2:]
    assert all(not g[REAL:].any() and g[:REAL].any() for g in grads)


def test_extreme_logits_stay_finite():
    x = torch.full((1, 2, 4), 1e4).requires_grad_()
    weight = torch.tensor([[1e4] * 4, [-1e4] * 4, [0.0] * 4])
    losses = chunked_cross_entropy(x, weight, None, torch.tensor([[0, 1]]), SINGLE, 3)
    assert losses.tolist() == [[0.0, pytest.approx(8e8)]]
    losses.sum().backward()
    assert x.grad.isfinite().all()


def test_frozen_inputs_get_no_gradient():
    (x, weight, bias), labels = draw(torch.float32, True)
    losses = chunked_cross_entropy(x, weight.detach(), bias.detach(), labels, SINGLE, REAL)
    (found,) = torch.autograd.grad(losses.sum(), [x])
    whole = vocab_parallel_cross_entropy(functional.linear(x, weight, bias), labels, SINGLE, REAL)
    torch.testing.assert_close(found, torch.autograd.grad(whole.sum(), [x])[0], rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


class LargeStorages(TorchDispatchMode):
    """Memory of at least ``bytes_least`` that any operation returns, forward or backward."""

    def __init__(self, bytes_least: int) -> None:
        super().__init__()
        self.bytes_least, self.found = bytes_least, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.bytes_least:
                self.found[tensor.untyped_storage().data_ptr()] = tensor  # held, or its address is used again
        return out


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_makes_one_tensor_of_the_logits_size(bias, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 1)
    model = replace(MODELS["tied_gelu_padded"], tie_embeddings=False, lm_head_bias=bias)
    head = LanguageModelHead(model, SINGLE, None, KernelConfig(loss="whole")).bfloat16()
    torch.nn.init.normal_(head.weight)
    tokens = 4 * head.weight.shape[1]  # more than the weight has columns: logits are the largest tensor
    x = torch.randn(1, tokens, head.weight.shape[1], dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(model.vocab_size, (1, tokens))
    with LargeStorages(2 * tokens * head.weight.shape[0]) as large:
        head(x, labels).sum().backward()
    assert len(large.found) == 1 and x.grad.isfinite().all()


def kept_bytes(compute: Any, given: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps besides the given tensors."""
    known = {t.untyped_storage().data_ptr() for t in given}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert compute().requires_grad
    return sum(kept.values())


def test_chunks_never_hold_all_logits_and_keep_a_few_numbers_per_token(monkeypatch):
    tokens, ids = 256, 512
    x = torch.randn(1, tokens, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(ids, 8, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(ids, (1, tokens))
    monkeypatch.setattr(cross_entropy, "LOSS_CHUNK_BYTES", 16 * ids * 4)

    def chunked() -> torch.Tensor:
        return chunked_cross_entropy(x, weight, None, labels, SINGLE, ids)

    def whole() -> torch.Tensor:
        return vocab_parallel_cross_entropy(functional.linear(x, weight), labels, SINGLE, ids)

    statistics = tokens * (8 + 4 + 8)  # label column; largest; sum, which shares its storage with the target
    assert kept_bytes(chunked, [x, weight]) == statistics
    assert (
        kept_bytes(whole, [x, weight]) == statistics + 2 * tokens * ids
    )  # logits as they are: no fp32 softmax
    for compute, largest in ((chunked, 16 * ids), (whole, tokens * ids)):
        with LargestTensor() as found:
            compute().sum().backward()
        assert found.elements == largest


def test_auto_takes_chunks_for_large_logits():
    assert 16384 * 32000 * 2 < most_whole_logits_bytes("auto") < 16384 * 128000 * 2
    assert most_whole_logits_bytes("chunked") < 0 and most_whole_logits_bytes("whole") > 10**15


def test_a_chunk_has_at_least_one_token():
    assert list(cross_entropy._chunks(2, 10**9, torch.float32)) == [slice(0, 1), slice(1, 2)]
    assert next(cross_entropy._chunks(10**6, 32000, torch.bfloat16)) == slice(0, 4194)


@pytest.mark.parametrize("times", [1.0, 20.0])
def test_under_autocast_gradients_are_those_of_the_logits_that_the_loss_saw(times, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOSS_CHUNK_BYTES", 4 * IDS * 4)
    inputs, labels = draw(torch.float32, bias=False)
    inputs[1] = (inputs[1].detach() * times).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = chunked_cross_entropy(*inputs, labels, SINGLE, REAL)
    low = [None if t is None else t.detach().bfloat16().requires_grad_() for t in inputs]
    expected = with_gradients(chunked_cross_entropy(*low, labels, SINGLE, REAL), low)
    found = with_gradients(losses, inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.to(one.dtype))
    wide = [None if t is None else t.detach().double().requires_grad_() for t in low]
    for one, other in zip(found, exact(wide, labels), strict=True):
        assert (one.double() - other).norm() / other.norm() < 2e-2
