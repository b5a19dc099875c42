"""Parameters of a model, from its config alone. Letters are those of ``config/model.py``."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lpa.config.model import ModelConfig
from megatron_lpa.config.run import ParallelConfig

ATTENTION_PROJECTIONS = ("q", "k", "v", "o")
FFN_PROJECTIONS = ("up", "gate", "down")


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, by what they are for. Padded ids count.

    Args:
        embedding: token embedding (which is the head's matrix too, when tied) and learned positions.
        attention: q, k, v, o of all layers, with biases.
        ffn: up, gate, down of all layers, with biases.
        norm: every norm, the final one included.
        head: language-model head; only its bias when tied.
    """

    embedding: int
    attention: int
    ffn: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return self.embedding + self.attention + self.ffn + self.norm + self.head


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Every parameter of the decoder that ``model`` describes."""
    vocab, d = model.padded_vocab_size, model.hidden_size
    norm = d * (2 if model.norm == "layernorm" else 1)

    def of(names: tuple[str, ...]) -> int:
        return sum(
            count * spec.local_elements(1)
            for layer, count in model.layer_kinds()
            for name in names
            if name in model.projection_widths()
            for spec in layer.structure(name).specs().values()
        )

    return ParameterCount(
        embedding=vocab * d + _positions(model),
        attention=of(ATTENTION_PROJECTIONS),
        ffn=of(FFN_PROJECTIONS),
        norm=norm * (2 * model.num_layers + int(model.final_norm)),
        head=(0 if model.tie_embeddings else vocab * d) + (vocab if model.lm_head_bias else 0),
    )


def _positions(model: ModelConfig) -> int:
    return model.sequence_length * model.hidden_size if model.position_embedding == "learned" else 0


def parameters_per_tensor_rank(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Parameters that one tensor-parallel rank holds before ZeRO shards them.

    Norms and learned positions are whole on every rank; the vocabulary is split; a projection's specs say of
    each of its parameters which it is.
    """
    size, layout = parallel.tensor_parallel_size, parallel.lowdim_layout
    counts = count_parameters(model)
    vocabulary = counts.embedding - _positions(model) + counts.head
    assert vocabulary % size == 0, (counts, size)
    projections = sum(
        count * spec.local_elements(size)
        for layer, count in model.layer_kinds()
        for name in model.projection_widths()
        for spec in layer.structure(name, size, layout).specs().values()
    )
    return counts.norm + _positions(model) + vocabulary // size + projections
