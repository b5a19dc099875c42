"""The decoder: one class covers every model of the paper by config. No collectives in sight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.layers.attention import Attention, rope_tables
from megatron_lpa.layers.embedding import LanguageModelHead, PositionEmbedding, TokenEmbedding
from megatron_lpa.layers.ffn import FeedForward
from megatron_lpa.layers.norm import RMSNorm, build_norm
from megatron_lpa.parallel.groups import ParallelGroups

Rope = tuple[torch.Tensor, torch.Tensor]
Recompute = Callable[[Callable[..., torch.Tensor], torch.Tensor, Rope | None], torch.Tensor]
"""Calls ``function(x, rope)`` now and again in the backward pass, keeping ``x`` and perhaps some results."""


class DecoderLayer(nn.Module):
    """Attention and FFN, each added to the residual stream.

    ``pre``: ``x + dropout(sublayer(norm(x)))``. ``post_sublayer``: ``x + dropout(norm(sublayer(x)))``.
    A sublayer that can fold the norm into its products is given it; whether it does, the kernels decide.

    Activation checkpointing stands inside ``forward``: hooks on the module, by which ZeRO-3 gathers parameters,
    run once and outside. Selective checkpointing compares the operations of both runs, and theirs differ.

    Args:
        model: the layer's config (``ModelConfig.at_layer``).
        groups: process groups.
        layout: tensor-parallel layout of low-dimensional modules.
        kernels: what computes the operations.
        recompute: activation checkpointing while training; None keeps all activations.
    """

    def __init__(
        self,
        model: ModelConfig,
        groups: ParallelGroups,
        layout: str,
        kernels: KernelConfig,
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm_first = model.norm_position == "pre"
        self.dropout = model.dropout
        self.attention_norm = build_norm(model, kernels)
        self.attention = Attention(model, groups, layout, kernels)
        self.ffn_norm = build_norm(model, kernels)
        self.ffn = FeedForward(model, groups, layout, kernels)

    def forward(self, x: torch.Tensor, rope: Rope | None) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)"""
        if self.recompute is not None and self.training and torch.is_grad_enabled():
            return self.recompute(self._compute, x, rope)
        return self._compute(x, rope)

    def _compute(self, x: torch.Tensor, rope: Rope | None) -> torch.Tensor:
        if self.norm_first:
            if self.attention.foldable and isinstance(self.attention_norm, RMSNorm):
                x = x + self._drop(self.attention(x, rope, self.attention_norm.folded))
            else:
                x = x + self._drop(self.attention(self.attention_norm(x), rope))
            if self.ffn.foldable and isinstance(self.ffn_norm, RMSNorm):
                return x + self._drop(self.ffn(x, self.ffn_norm.folded))
            return x + self._drop(self.ffn(self.ffn_norm(x)))
        x = x + self._drop(self.attention_norm(self.attention(x, rope)))
        return x + self._drop(self.ffn_norm(self.ffn(x)))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.dropout, self.training)


class Decoder(nn.Module):
    """A causal language model.

    Args:
        model: what to build.
        groups: process groups; ``ParallelGroups.single()`` for one process.
        layout: tensor-parallel layout of low-dimensional modules.
        recompute: activation checkpointing of each layer; None keeps all activations.
        kernels: what computes the operations.
        autocast: what ``torch.autocast`` makes of the products' inputs; None computes in the parameters' dtype.

    Parameters are uninitialised until ``megatron_lpa.model.init.initialize`` has run.
    """

    def __init__(
        self,
        model: ModelConfig,
        groups: ParallelGroups,
        layout: str = "latent",
        recompute: Recompute | None = None,
        kernels: KernelConfig = KernelConfig(),  # noqa: B008 - frozen
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = model
        self.groups = groups
        self.autocast = autocast
        self.token_embedding = TokenEmbedding(model, groups)
        learned = model.position_embedding == "learned"
        self.position_embedding = PositionEmbedding(model) if learned else None
        self.layers = nn.ModuleList(
            DecoderLayer(model.at_layer(layer), groups, layout, kernels, recompute)
            for layer in range(model.num_layers)
        )
        self.final_norm = build_norm(model, kernels) if model.final_norm else None
        tied = self.token_embedding if model.tie_embeddings else None
        self.head = LanguageModelHead(model, groups, tied, kernels)
        self._rope: Rope | None = None

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Per-token loss, or logits.

        Args:
            tokens: (B, S) int64, S at most ``sequence_length`` with learned positions.
            labels: (B, S) int64, the next token of each position; None for logits.

        Returns:
            With labels, losses (B, S) in fp32; without, this rank's logits (B, S, V/T).
        """
        if self.autocast is None:
            return self._compute(tokens, labels)
        # Here and not around the engine's call: DeepSpeed ends an autocast that is not its own. Without the cache, which
        # would keep bf16 copies of all weights to the end of the pass; each is used once.
        with torch.autocast(tokens.device.type, self.autocast, cache_enabled=False):
            return self._compute(tokens, labels)

    def _compute(self, tokens: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(tokens.shape[1])
        rope = self._rope_tables(tokens) if self.config.position_embedding == "rope" else None
        for layer in self.layers:
            x = layer(x, rope)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return self.head(x, labels)

    def _rope_tables(self, tokens: torch.Tensor) -> Rope:
        length = max(tokens.shape[1], self.config.sequence_length)
        if self._rope is None or self._rope[0].shape[0] < length or self._rope[0].device != tokens.device:
            with torch.inference_mode(False):  # kept for later calls, which may be training
                self._rope = rope_tables(length, self.config.head_width, self.config.rope_base, tokens.device)
        cos, sin = self._rope
        return cos[: tokens.shape[1]], sin[: tokens.shape[1]]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._rope = None  # the tables follow the device of the tokens
        return super()._apply(fn, recurse)
