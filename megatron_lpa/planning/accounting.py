"""What a model costs, from its config alone: parameters, FLOPs, elements moved by tensor parallelism.

Nothing is allocated and torch is not needed. ``planning/memory.py`` has the bytes. Letters are those of
``config/model.py``; ``T`` is the tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lpa.config.model import INPUT_PROJECTIONS, ModelConfig
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


def projection_parameters(model: ModelConfig, name: str) -> tuple[int, int]:
    """``(matrix elements, bias elements)`` of one layer's projection ``name``; ``model`` is that layer's (``at_layer``)."""
    d_in, d_out = model.projection_widths()[name]
    projection = getattr(model.projections, name)
    latent_bias, output_bias = model.biases(name)
    biases = (projection.rank if latent_bias else 0) + (d_out if output_bias else 0)
    return projection.elements(d_in, d_out), biases


def norm_parameters(model: ModelConfig) -> int:
    """Parameters of one norm: a weight, and a bias with layernorm."""
    return model.hidden_size * (2 if model.norm == "layernorm" else 1)


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Every parameter of the decoder that ``model`` describes."""
    d, vocab = model.hidden_size, model.padded_vocab_size
    positions = model.sequence_length if model.position_embedding == "learned" else 0

    def of(names: tuple[str, ...]) -> int:
        present = [name for name in names if name in model.projection_widths()]
        return sum(
            count * sum(projection_parameters(layer, name))
            for layer, count in model.layer_kinds()
            for name in present
        )

    return ParameterCount(
        embedding=(vocab + positions) * d,
        attention=of(ATTENTION_PROJECTIONS),
        ffn=of(FFN_PROJECTIONS),
        norm=norm_parameters(model) * (2 * model.num_layers + int(model.final_norm)),
        head=(0 if model.tie_embeddings else vocab * d) + (vocab if model.lm_head_bias else 0),
    )


def flops_per_token_forward(model: ModelConfig) -> int:
    """FLOPs of one forward pass, per token of a full sequence.

    Two per multiply-add of every matrix, the head included, and of attention's two products over the
    causal half of the score matrix: ``Q K^T`` and ``A V`` are ``2 S H E`` each for all keys, halved.
    Not counted: embedding lookups, norms, softmax, activations, biases.
    """
    matrices = sum(
        count * projection_parameters(layer, name)[0]
        for layer, count in model.layer_kinds()
        for name in model.projection_widths()
    )
    attention = 2 * model.sequence_length * model.num_heads * model.head_width
    head = 2 * model.padded_vocab_size * model.hidden_size
    return 2 * matrices + model.num_layers * attention + head


def flops_per_token_training(model: ModelConfig) -> int:
    """Model FLOPs of forward and backward, per token: backward costs two forwards.

    This is what MFU counts; recomputed activations are not work that the model asks for.
    """
    return 3 * flops_per_token_forward(model)


def hardware_flops_per_token_training(model: ModelConfig, activation_checkpointing: str) -> int:
    """FLOPs that are executed: with ``full`` checkpointing every layer runs forward once more.

    ``selective`` repeats no matrix product. The head is outside the checkpointed layers and runs forward once
    (once more with ``kernels.loss=chunked``, which is not counted here).
    """
    forward = flops_per_token_forward(model)
    head = 2 * model.padded_vocab_size * model.hidden_size
    recomputed = forward - head if activation_checkpointing == "full" else 0
    return 3 * forward + recomputed


@dataclass(frozen=True)
class CollectiveElements:
    """Elements that tensor parallelism moves per token and layer, to be multiplied by ``(T-1)/T``; the mean over layers.

    That product is what one rank sends in a ring: an all-reduce of n elements counts 2n, an
    all-gather to n or a reduce-scatter of n elements counts n.
    """

    attention_forward: float
    attention_backward: float
    ffn_forward: float
    ffn_backward: float

    @property
    def forward(self) -> float:
        """Attention and FFN."""
        return self.attention_forward + self.ffn_forward

    @property
    def backward(self) -> float:
        """Attention and FFN."""
        return self.attention_backward + self.ffn_backward


def collective_elements_per_token(model: ModelConfig, parallel: ParallelConfig) -> CollectiveElements:
    """What tensor parallelism moves in a layer, the mean over all layers; see ``layers/lowdim.py`` for where.

    ====================== ============================= =================================
    projection             forward                       backward
    ====================== ============================= =================================
    dense q k v up gate    -                             -
    ``column_row`` input side    reduce-scatter d_out          all-gather d_out
    ``latent`` input side  all-gather r                  reduce-scatter r
    dense o down           all-reduce D: 2D              -
    ``column_row`` output side   reduce-scatter r, all-reduce  all-gather r
                           D: r + 2D
    ``latent`` output side all-reduce r: 2r              -
    ====================== ============================= =================================

    In backward each sublayer also all-reduces the gradient of its input, 2D, once for all the
    projections that read it. The embedding and the head, outside the layers, are not counted.
    """

    def sublayer(names: tuple[str, ...]) -> tuple[float, float]:
        forward, backward = 0, 2 * model.hidden_size * model.num_layers
        present = [name for name in names if name in model.projection_widths()]
        for layer, count in model.layer_kinds():
            for name in present:
                moved = _projection_elements(layer, parallel.lowdim_layout, name)
                forward, backward = forward + count * moved[0], backward + count * moved[1]
        return _mean(forward, model.num_layers), _mean(backward, model.num_layers)

    attention, ffn = sublayer(ATTENTION_PROJECTIONS), sublayer(FFN_PROJECTIONS)
    return CollectiveElements(attention[0], attention[1], ffn[0], ffn[1])


def _mean(total: int, count: int) -> float:
    return total / count if total % count else total // count


def _projection_elements(model: ModelConfig, layout: str, name: str) -> tuple[int, int]:
    """``(forward, backward)`` of one projection, by the table above."""
    _, d_out = model.projection_widths()[name]
    projection = getattr(model.projections, name)
    r = projection.rank
    if name in INPUT_PROJECTIONS:
        if projection.kind == "dense":
            return 0, 0
        return (d_out, d_out) if layout == "column_row" else (r, r)
    if projection.kind == "dense":
        return 2 * d_out, 0
    return (r + 2 * d_out, r) if layout == "column_row" else (2 * r, 0)
