"""Activation checkpointing: gradients equal bit by bit, and what ``selective`` keeps and repeats."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import MODELS, SETTING_2, lowdim
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lpa.config import KernelConfig, ModelConfig, ParallelConfig, TrainConfig
from megatron_lpa.model import recompute
from megatron_lpa.model.init import initialize
from megatron_lpa.model.recompute import recompute_for
from megatron_lpa.model.transformer import Decoder, DecoderLayer
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.planning.memory import kept_bytes_per_token_layer

SINGLE = ParallelGroups.single()


def decoder_of(model: ModelConfig, mode: str, kernels: KernelConfig, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(model, SINGLE, "latent", recompute_for(mode), kernels)
    initialize(decoder, model, SINGLE, 3)
    return decoder.to(dtype).train()


def results(model: ModelConfig, mode: str, kernels: KernelConfig, dtype: torch.dtype) -> list[torch.Tensor]:
    decoder = decoder_of(model, mode, kernels, dtype)
    ids = torch.randint(model.vocab_size, (3, 13), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    losses = decoder(ids[:, :-1], ids[:, 1:])
    losses.mean().backward()
    return [losses.detach(), *(p.grad for p in decoder.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kernels",
    [
        KernelConfig(),
        KernelConfig(lowdim="joined", elementwise="compiled", loss="chunked"),
    ],
    ids=["eager", "joined-compiled-chunked"],
)
@pytest.mark.parametrize("name", ["s1_low_all", "s2_low_all", "gqa_wide_heads", "tied_gelu_padded"])
def test_gradients_are_equal_bit_by_bit(name, kernels, dtype):
    torch._dynamo.reset()  # so that the first compilation happens inside a checkpointed layer
    model = replace(MODELS[name], dropout=0.2)
    selective, full, none = (results(model, m, kernels, dtype) for m in ("selective", "full", "none"))
    assert all(torch.equal(one, other) for one, other in zip(full, none, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(selective, none, strict=True))


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lowdim_path", ["eager", "joined"])
def test_selective_repeats_no_product_and_no_attention(lowdim_path):
    """Head width 8 and fp32, for which PyTorch has a fused attention on a CPU."""
    model = replace(SETTING_2, projections=lowdim(q=8, k=8, v=8, o=8, up=16))
    calls = {}
    for mode in ("none", "selective", "full"):
        decoder = decoder_of(model, mode, KernelConfig(lowdim=lowdim_path), torch.float32)
        ids = torch.randint(model.vocab_size, (2, 13))
        with Count() as counted:
            decoder(ids[:, :-1], ids[:, 1:]).mean().backward()
        calls[mode] = {name: n for name, n in counted.calls.items() if name in recompute._PRODUCTS}
    assert any("attention" in name for name in calls["none"])
    assert calls["selective"] == calls["none"]
    assert sum(calls["full"].values()) > sum(calls["none"].values())


def test_nothing_is_checkpointed_without_training(monkeypatch):
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(recompute, "checkpoint", refuse)
    model = MODELS["s1_lpa"]
    decoder = decoder_of(model, "selective", KernelConfig(), torch.float32)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        decoder(ids)
    decoder.eval()(ids)
    with pytest.raises(AssertionError):
        decoder.train()(ids)


@pytest.mark.parametrize("name", ["s1_transformer", "s1_low_all", "s2_low_all", "tied_gelu_padded"])
def test_selective_keeps_the_bytes_of_the_estimate(name, monkeypatch):
    model = MODELS[name]
    layer = DecoderLayer(model, SINGLE, "latent", KernelConfig(), recompute_for("selective"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    contexts: list[Any] = []
    make = checkpoint.create_selective_checkpoint_contexts

    def remember(policy: Any) -> Any:
        contexts.append(make(policy))
        return contexts[-1]

    monkeypatch.setattr(recompute, "create_selective_checkpoint_contexts", remember)
    x = torch.randn(2, 12, model.hidden_size, requires_grad=True)
    from megatron_lpa.layers.sublayers import rope_tables

    rope = rope_tables(12, model.head_width, 1e4, x.device) if model.position_embedding == "rope" else None
    layer(x, rope)
    kept: dict[int, int] = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}
    for entries in contexts[0][0].storage.values():
        for entry in entries.values():
            for wrapped in torch.utils._pytree.tree_leaves(entry):
                if hasattr(wrapped, "val"):
                    storage = wrapped.val.untyped_storage()
                    kept[storage.data_ptr()] = storage.nbytes()
    train = TrainConfig(precision="fp32", activation_checkpointing="selective")
    per_token = sum(kept.values()) / (2 * 12)
    assert per_token == kept_bytes_per_token_layer(model, ParallelConfig(), train)
