"""Rows by blocks on a CPU: the bits of all rows at once, whatever the sizes, and the value of float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_lpa.layers import cross_entropy
from megatron_lpa.ops.elementwise import wide

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(rows: int, columns: int, dtype: torch.dtype, spare: int) -> list[torch.Tensor]:
    """Logits whose rows lie ``spare`` columns apart, label columns or -1, and what comes from above."""
    generator = torch.Generator().manual_seed(rows + columns)
    scores = (5 * torch.randn(rows, columns + spare, generator=generator)).to(dtype)[:, :columns]
    local = torch.randint(-1, columns, (rows,), generator=generator)
    return [scores, local, torch.randn(rows, generator=generator, dtype=wide(scores).dtype)]


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_give_the_bits_of_all_rows_at_once(dtype, spare, threads, monkeypatch):
    for rows, columns, block_bytes in itertools.product(
        (1, 2, 3, 5, 17), (1, 7, 1000, 40000), (1, 2**14, 2**20)
    ):
        scores, local, upstream = drawn(rows, columns, dtype, spare)
        monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 2**40)
        whole = cross_entropy.shard_statistics(scores, local, "eager")
        at_once = torch.empty_like(scores)
        cross_entropy.shard_gradient(scores, local, *whole[:2], upstream, "eager", at_once)
        for found, expected in zip(whole, cross_entropy.statistics_at_once(scores, local), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(at_once, cross_entropy.gradient_at_once(scores, local, *whole[:2], upstream))
        monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", block_bytes)
        blocks = cross_entropy.shard_statistics(scores, local, "eager")
        for found, expected in zip(blocks, whole, strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected), (rows, columns)
        own = torch.empty_like(scores)
        cross_entropy.shard_gradient(scores, local, *blocks[:2], upstream, "eager", own)
        cross_entropy.shard_gradient(scores, local, *blocks[:2], upstream, "eager", scores)  # over the logits
        assert torch.equal(own, at_once) and torch.equal(scores, at_once), (rows, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks_give_the_values_of_float64(dtype, monkeypatch):
    """37 rows in blocks of two, and three at the end; two of the rows extreme."""
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 1)
    scores, local, upstream = drawn(37, 300, dtype, 0)
    limit = 6e4 if dtype == torch.float16 else 1e30
    scores[3], scores[5] = -limit, limit
    scores[3, 7] = scores[5, 7] = 0
    exact, hit = scores.double(), local >= 0
    largest, total, target = cross_entropy.shard_statistics(scores, local, "eager")
    lse = exact.logsumexp(-1)
    torch.testing.assert_close(largest.double() + total.double().log(), lse, rtol=1e-6, atol=0)
    assert torch.equal(target.double()[hit], exact[hit, local[hit]]) and not target[~hit].any()
    one_hot = torch.zeros_like(exact)
    one_hot[hit, local[hit]] = 1
    expected = (exact.softmax(-1) - one_hot) * upstream.double().unsqueeze(-1)
    found = torch.empty_like(scores)
    cross_entropy.shard_gradient(scores, local, largest, total, upstream, "eager", found)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance / 100)


def test_no_rows_are_no_error():
    scores, local, upstream = drawn(0, 5, torch.float32, 0)
    for numbers in cross_entropy.shard_statistics(scores, local, "eager"):
        assert numbers.shape == (0,)
        cross_entropy.shard_gradient(scores, local, numbers, numbers, upstream, "eager", scores)
