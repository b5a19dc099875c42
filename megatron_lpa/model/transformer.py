"""The decoder: one class covers every model of the paper by config.

Norms, embeddings, a layer, the language-model head, all of them. The sublayers are in
``layers/sublayers.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.config.kernels import most_whole_logits_bytes
from megatron_lpa.layers.cross_entropy import chunked_cross_entropy, vocab_parallel_cross_entropy
from megatron_lpa.layers.sublayers import Attention, FeedForward, rope_tables
from megatron_lpa.ops.elementwise import layer_norm, rms_norm
from megatron_lpa.ops.products import Norm, as_product_input
from megatron_lpa.parallel.collectives import copy_to_tp, reduce_from_tp
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import new_parameter
from megatron_lpa.structures.parameter_spec import ParameterSpec

Rope = tuple[torch.Tensor, torch.Tensor]
Recompute = Callable[[Callable[..., torch.Tensor], torch.Tensor, Rope | None], torch.Tensor]
"""Calls ``function(x, rope)`` now and again in the backward pass, keeping ``x`` and perhaps some results."""


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis."""

    def __init__(self, width: int, eps: float, backend: str = "eager") -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = new_parameter(ParameterSpec((width,), "norm_weight", width), 1)
        self.bias = new_parameter(ParameterSpec((width,), "norm_bias", width), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)"""
        return layer_norm(x, self.weight, self.bias, self.eps, self.backend)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""

    def __init__(self, width: int, eps: float, backend: str = "eager") -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = new_parameter(ParameterSpec((width,), "norm_weight", width), 1)

    @property
    def folded(self) -> Norm:
        """What a product needs in order to compute this norm itself."""
        return Norm(self.weight, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)"""
        return rms_norm(x, self.weight, self.eps, self.backend)


def build_norm(model: ModelConfig, kernels: KernelConfig) -> nn.Module:
    """The norm that ``model.norm`` asks for."""
    kind = LayerNorm if model.norm == "layernorm" else RMSNorm
    return kind(model.hidden_size, model.norm_eps, kernels.elementwise)


class TokenEmbedding(nn.Module):
    """Rows of a (V, D) matrix split over ranks; each rank looks up its own ids, then all are summed."""

    def __init__(self, model: ModelConfig, groups: ParallelGroups) -> None:
        super().__init__()
        self.groups = groups
        self.rows = model.padded_vocab_size // groups.tp_size
        spec = ParameterSpec(
            (model.padded_vocab_size, model.hidden_size),
            "embedding",
            model.hidden_size,
            tp_dim=0,
            real_rows=model.vocab_size,
        )
        self.weight = new_parameter(spec, groups.tp_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids (B, S) int64 -> (B, S, D)"""
        if self.groups.tp_size == 1:
            return functional.embedding(tokens, self.weight)
        local = tokens - self.groups.tp_rank * self.rows
        elsewhere = (local < 0) | (local >= self.rows)
        found = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_tp(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.groups)


class PositionEmbedding(nn.Module):
    """Learned absolute positions, replicated over ranks."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        shape = (model.sequence_length, model.hidden_size)
        self.weight = new_parameter(ParameterSpec(shape, "embedding", model.hidden_size), 1)

    def forward(self, length: int) -> torch.Tensor:
        """-> (length, D), positions 0 to length - 1"""
        return self.weight[:length]


class DecoderLayer(nn.Module):
    """Attention and FFN, each added to the residual stream.

    ``pre``: ``x + dropout(sublayer(norm(x)))``. ``post_sublayer``: ``x + dropout(norm(sublayer(x)))``.
    A sublayer that can fold the norm into its products is given it; whether it does, the kernels decide.

    Activation checkpointing stands inside ``forward``: hooks on the module, by which ZeRO-3 gathers
    parameters, run once and outside. Selective checkpointing compares the operations of both runs, and theirs
    differ.

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


class LanguageModelHead(nn.Module):
    """Column-parallel projection to the vocabulary, and the loss; logits stay split over ranks.

    The loss is computed in here because *chunked* needs the weight, and ZeRO-3 gathers that only while the
    module that owns it runs.

    Args:
        model: the decoder's config.
        groups: process groups.
        tied: the token embedding whose matrix is reused; None for a matrix of its own.
        kernels: how the loss is computed.
    """

    def __init__(
        self,
        model: ModelConfig,
        groups: ParallelGroups,
        tied: TokenEmbedding | None,
        kernels: KernelConfig,
    ) -> None:
        super().__init__()
        self.groups, self.vocab_size = groups, model.vocab_size
        self.backend, self.most_bytes = kernels.elementwise, most_whole_logits_bytes(kernels.loss)
        rows, width = model.padded_vocab_size, model.hidden_size
        if tied is None:
            spec = ParameterSpec((rows, width), "head", width, tp_dim=0, real_rows=model.vocab_size)
            self.weight = new_parameter(spec, groups.tp_size)
        else:
            self.weight = tied.weight
        self.bias: nn.Parameter | None = None
        if model.lm_head_bias:
            bias_spec = ParameterSpec((rows,), "bias", width, tp_dim=0, real_rows=model.vocab_size)
            self.bias = new_parameter(bias_spec, groups.tp_size)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S, D) -> logits (B, S, V/T) of this rank's ids; with labels (B, S), losses (B, S)."""
        x = as_product_input(x)
        if self.groups.tp_size > 1:
            x = copy_to_tp(x, self.groups)
        backend = self.backend
        if labels is not None and labels.numel() * self.weight.shape[0] * x.element_size() > self.most_bytes:
            return chunked_cross_entropy(
                x, self.weight, self.bias, labels, self.groups, self.vocab_size, backend
            )
        logits = functional.linear(x, self.weight, self.bias)
        if labels is None:
            return logits
        return vocab_parallel_cross_entropy(
            logits, labels, self.groups, self.vocab_size, backend, overwrite=True
        )


class Decoder(nn.Module):
    """A causal language model.

    Args:
        model: what to build.
        groups: process groups; ``ParallelGroups.single()`` for one process.
        layout: tensor-parallel layout of low-dimensional modules.
        recompute: activation checkpointing of each layer; None keeps all activations.
        kernels: what computes the operations.
        autocast: what ``torch.autocast`` makes of the products' inputs; None computes in the parameters'
            dtype.

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
        # Here and not around the engine's call: DeepSpeed ends an autocast that is not its own. Without the
        # cache, which would keep bf16 copies of all weights to the end of the pass; each is used once.
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
