"""Cross-entropy against torch's, and the treatment of padded ids."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from megatron_lpa.layers.cross_entropy import mask_padded_ids, vocab_parallel_cross_entropy
from megatron_lpa.parallel.groups import ParallelGroups

SINGLE = ParallelGroups.single()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_loss_and_gradient_equal_torch(dtype, scale):
    logits = (torch.randn(2, 5, 11) * scale).to(dtype).requires_grad_()
    labels = torch.randint(11, (2, 5))
    loss = vocab_parallel_cross_entropy(logits, labels, SINGLE, 11)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = logits.detach().double().requires_grad_()
    expected = functional.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(2, 5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, 5)
    loss.backward(upstream.to(loss.dtype))
    expected.backward(upstream.double())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ids", [11, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_over_the_logits_is_the_same_and_takes_their_memory(dtype, ids):
    x, weight = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 5, 8), (11, 8)))
    labels, upstream = torch.randint(ids, (2, 5)), torch.randn(2, 5)
    kept = functional.linear(x, weight)
    losses = vocab_parallel_cross_entropy(kept, labels, SINGLE, ids)
    expected = torch.autograd.grad(losses, [x, weight], upstream.to(losses.dtype))
    before = kept.detach().clone()
    logits, passed = functional.linear(x, weight), []
    logits.register_hook(passed.append)
    losses = vocab_parallel_cross_entropy(logits, labels, SINGLE, ids, overwrite=True)
    assert torch.equal(logits, before), "forward leaves them alone"
    found = torch.autograd.grad(losses, [x, weight], upstream.to(losses.dtype), retain_graph=True)
    assert all(map(torch.equal, found, expected))
    assert passed[0].data_ptr() == logits.data_ptr()
    assert torch.equal(kept, before), "nobody's logits are overwritten unasked"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_gradient_of_logits_that_are_no_one_block_of_memory():
    logits = torch.randn(3, 2, 11, requires_grad=True)
    labels, turned = torch.randint(11, (2, 3)), logits.transpose(0, 1)
    expected = functional.cross_entropy(turned.reshape(-1, 11), labels.flatten(), reduction="sum")
    (wanted,) = torch.autograd.grad(expected, logits)
    vocab_parallel_cross_entropy(turned, labels, SINGLE, 11, overwrite=True).sum().backward()
    torch.testing.assert_close(logits.grad, wanted)


def test_padded_ids_take_no_part():
    logits = torch.randn(1, 3, 10)
    logits[..., 7:] = 1e6
    labels = torch.tensor([[0, 6, 3]])
    expected = functional.cross_entropy(logits[..., :7].flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(vocab_parallel_cross_entropy(logits, labels, SINGLE, 7)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padded_ids_get_no_gradient_and_no_probability(dtype):
    logits = torch.randn(2, 3, 10).to(dtype)
    logits[..., 7:] = 1e4
    logits.requires_grad_()
    labels = torch.randint(7, (2, 3))
    vocab_parallel_cross_entropy(logits, labels, SINGLE, 7).sum().backward()
    assert logits.grad[..., 7:].abs().max() == 0
    # softmax - one-hot sums to 0 over the real ids: all probability is theirs.
    assert logits.grad[..., :7].double().sum(dim=-1).abs().max() < (2e-2 if dtype == torch.bfloat16 else 1e-6)
    assert mask_padded_ids(logits, 7, 0).softmax(dim=-1)[..., 7:].abs().max() == 0


def test_masking_a_shard_counts_from_its_first_id():
    shard = torch.zeros(1, 4)
    assert mask_padded_ids(shard, vocab_size=10, first_id=4).isinf().sum() == 0
    assert mask_padded_ids(shard, vocab_size=10, first_id=8).isinf().tolist() == [[False, False, True, True]]
    assert mask_padded_ids(shard, vocab_size=10, first_id=12).isinf().all()
