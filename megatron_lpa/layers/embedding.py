"""Token and position embeddings, and the language-model head: everything split over the vocabulary."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.config.kernels import takes_chunks
from megatron_lpa.layers.loss import chunked_cross_entropy, vocab_parallel_cross_entropy
from megatron_lpa.ops.products import as_product_input
from megatron_lpa.parallel.collectives import copy_to_tp, reduce_from_tp
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import ParameterSpec, new_parameter


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


class LanguageModelHead(nn.Module):
    """Column-parallel projection to the vocabulary, and the loss; logits stay split over ranks.

    The loss is computed in here because *chunked* needs the weight, and ZeRO-3 gathers that only while the module
    that owns it runs.

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
        self.groups, self.kernels, self.vocab_size = groups, kernels, model.vocab_size
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
        x = copy_to_tp(as_product_input(x), self.groups)
        backend = self.kernels.elementwise
        if labels is not None and takes_chunks(
            self.kernels.loss, labels.numel(), self.weight.shape[0], x.element_size()
        ):
            return chunked_cross_entropy(
                x, self.weight, self.bias, labels, self.groups, self.vocab_size, backend
            )
        logits = functional.linear(x, self.weight, self.bias)
        if labels is None:
            return logits
        return vocab_parallel_cross_entropy(
            logits, labels, self.groups, self.vocab_size, backend, overwrite=True
        )
