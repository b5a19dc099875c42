"""What the decoder is: widths, depth, and how every linear is factored.

Legend used in shapes throughout the package:
``B`` sequences in a micro-batch, ``S`` tokens in a sequence, ``D`` hidden size, ``F`` FFN width,
``H`` query heads, ``K`` key/value heads, ``E`` head dimension, ``R`` rank of a low-dimensional
module, ``V`` (padded) vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Literal

from megatron_lpa.structures.projection import ProjectionConfig, layers_meant, sides_of
from megatron_lpa.structures.structure import Structure

INPUT_PROJECTIONS = ("q", "k", "v", "up", "gate")
"""Projections that read the residual stream: their outputs are split under tensor parallelism."""

OUTPUT_PROJECTIONS = ("o", "down")
"""Projections that write the residual stream: their inputs are split under tensor parallelism."""


@dataclass(frozen=True)
class ProjectionsConfig:
    """One spec per linear of a decoder layer. ``gate`` exists only with ``activation: swiglu``."""

    q: ProjectionConfig = field(default_factory=ProjectionConfig)
    k: ProjectionConfig = field(default_factory=ProjectionConfig)
    v: ProjectionConfig = field(default_factory=ProjectionConfig)
    o: ProjectionConfig = field(default_factory=ProjectionConfig)
    up: ProjectionConfig = field(default_factory=ProjectionConfig)
    gate: ProjectionConfig = field(default_factory=ProjectionConfig)
    down: ProjectionConfig = field(default_factory=ProjectionConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The decoder. Defaults are the paper's Setting 1 (small) Transformer.

    Args:
        vocab_size: number of token ids the tokenizer can produce.
        pad_vocab_to_multiple_of: rows of the embedding and of the head are padded up to this multiple
            (useful when TP does not divide ``vocab_size``); padded ids can never be predicted.
        sequence_length: tokens the model sees at once; also the number of learned positions.
        hidden_size: width D of the residual stream.
        num_layers: decoder layers.
        num_heads: query heads H.
        num_kv_heads: key/value heads K (grouped-query attention); empty means ``num_heads``.
        head_dim: width E of one head; empty means ``hidden_size // num_heads``.
            ``num_heads * head_dim`` may differ from ``hidden_size`` (Table 8, "Attn Dim").
        ffn_hidden_size: width F of the FFN.
        activation: ``relu``, ``gelu`` (by the error function) and ``gelu_tanh`` (its approximation by tanh,
            as in GPT-2) use two FFN matrices, ``swiglu`` three (gate, up, down).
        norm: normalisation of each sublayer.
        norm_eps: epsilon inside the norm.
        norm_position: ``pre``: ``x + dropout(sublayer(norm(x)))``;
            ``post_sublayer``: ``x + dropout(norm(sublayer(x)))`` (the paper's Setting 1).
        final_norm: one more norm before the language-model head.
        position_embedding: ``learned`` absolute positions, ``rope`` (half rotation) or ``none``.
        rope_base: base of the rotary frequencies.
        linear_bias: biases in attention and FFN. Dense layers get one; of a low-dimensional module
            only ``W_A`` has one in q, k, v, up, gate and only ``W_B`` has one in o, down.
            ``model.projections.*.bias`` says otherwise for one projection.
        lm_head_bias: bias of the language-model head (one value per padded id).
        dropout: probability applied to each sublayer's contribution to the residual stream.
        tie_embeddings: the head reuses the token embedding's matrix.
        init: ``pytorch`` draws what ``nn.Linear`` and ``nn.Embedding`` draw by default (the paper's
            public code); ``normal`` draws N(0, ``init_std``), output projections scaled by
            ``1/sqrt(2 num_layers)``, and balances a pair so that ``W_B W_A`` has that deviation.
        init_std: standard deviation of ``init: normal``.
        projections: one spec per linear.
    """

    vocab_size: int = 32000
    pad_vocab_to_multiple_of: int = 1
    sequence_length: int = 512
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_hidden_size: int = 3072
    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu"] = "relu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_position: Literal["pre", "post_sublayer"] = "post_sublayer"
    final_norm: bool = False
    position_embedding: Literal["learned", "rope", "none"] = "learned"
    rope_base: float = 10000.0
    linear_bias: bool = True
    lm_head_bias: bool = True
    dropout: float = 0.1
    tie_embeddings: bool = False
    init: Literal["pytorch", "normal"] = "pytorch"
    init_std: float = 0.02
    projections: ProjectionsConfig = field(default_factory=ProjectionsConfig)

    @property
    def kv_heads(self) -> int:
        """Key/value heads K, with the default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width E of one head, with the default resolved."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows V of the embedding and of the head."""
        multiple = self.pad_vocab_to_multiple_of
        return -(-self.vocab_size // multiple) * multiple

    def at_layer(self, layer: int) -> ModelConfig:
        """This model with the projections that one layer has; ``by_layer`` is empty then."""
        specs = {f.name: getattr(self.projections, f.name) for f in dataclasses.fields(self.projections)}
        if all(spec.by_layer is None for spec in specs.values()):
            return self
        own = ProjectionsConfig(**{name: spec.at_layer(layer) for name, spec in specs.items()})
        return dataclasses.replace(self, projections=own)

    def layer_kinds(self) -> list[tuple[ModelConfig, int]]:
        """Runs of equal layers, from the first on: ``at_layer`` of each, and how many layers it has."""
        ends = {0, self.num_layers}
        for projection in dataclasses.fields(self.projections):
            for layers in getattr(self.projections, projection.name).by_layer or ():
                meant = layers_meant(layers)
                ends |= {end for end in (meant.start, meant.stop) if end < self.num_layers}
        bounds = sorted(ends)
        return [(self.at_layer(first), end - first) for first, end in itertools.pairwise(bounds)]

    def structure(
        self, name: str, tp_size: int = 1, layout: str = "latent", settings: ProjectionConfig | None = None
    ) -> Structure:
        """What projection ``name`` of ``at_layer`` is.

        Args:
            name: of the projection.
            tp_size: tensor-parallel size.
            layout: tensor-parallel layout of low-dimensional modules.
            settings: in place of those of ``projections``.

        Raises:
            UserError: there is no such kind.
        """
        settings = getattr(self.projections, name) if settings is None else settings
        assert settings.by_layer is None, (name, settings)
        sides = sides_of(settings.kind)
        built = sides.input if name in INPUT_PROJECTIONS else sides.output
        return built(settings, *self.projection_widths()[name], self.linear_bias, tp_size, layout)

    def projection_widths(self) -> dict[str, tuple[int, int]]:
        """``(d_in, d_out)`` of every linear that this model has, by projection name."""
        d, f = self.hidden_size, self.ffn_hidden_size
        q_width, kv_width = self.num_heads * self.head_width, self.kv_heads * self.head_width
        widths = {"q": (d, q_width), "k": (d, kv_width), "v": (d, kv_width), "o": (q_width, d)}
        if self.activation == "swiglu":
            widths["gate"] = (d, f)
        widths["up"] = (d, f)
        widths["down"] = (f, d)
        return widths
