"""Which implementation of attention runs, and in which layout."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from megatron_lpa.errors import UserError
from megatron_lpa.layers.sublayers import _check_flash_attn, causal_attention


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("path", ["auto", "sdpa"])
def test_equals_the_formula(path, kv_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, heads, 8) for heads in (4, kv_heads, kv_heads))
    expected = written_out(q, k, v)
    torch.testing.assert_close(causal_attention(q, k, v, path).double(), expected, rtol=1e-5, atol=1e-5)


def test_heads_come_back_next_to_each_other():
    """So that joining them for the output projection is a view."""
    q = torch.randn(2, 64, 4, 16)
    mixed = causal_attention(q, q, q, "sdpa")
    assert mixed.flatten(-2).untyped_storage().data_ptr() == mixed.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("device", "dtype", "there", "message"),
    [
        ("cpu", torch.bfloat16, True, "needs a GPU, but the model is on cpu"),
        ("cuda", torch.float32, True, "needs half precision, not torch.float32"),
        ("cuda", torch.bfloat16, False, "needs the package flash-attn"),
    ],
)
def test_flash_attn_says_why_it_cannot_run(device, dtype, there, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    _check_flash_attn.cache_clear()
    with pytest.raises(UserError, match=f"{message}.*kernels.attention=auto"):
        _check_flash_attn(device, dtype)
    _check_flash_attn.cache_clear()


def test_flash_attn_is_refused_on_a_cpu():
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(UserError, match="needs a GPU"):
        causal_attention(q, q, q, "flash_attn")
