"""FLOPs of a model per token, from its config alone. Letters are those of ``config/model.py``."""

from __future__ import annotations

from megatron_lpa.config.model import ModelConfig


def flops_per_token_forward(model: ModelConfig) -> int:
    """FLOPs of one forward pass, per token of a full sequence.

    Two per multiply-add of every matrix, the head included, and of attention's two products over the
    causal half of the score matrix: ``Q K^T`` and ``A V`` are ``2 S H E`` each for all keys, halved.
    Not counted: embedding lookups, norms, softmax, activations, biases.
    """
    matrices = sum(
        count * layer.structure(name).elements(matrices=True)
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
