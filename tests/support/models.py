"""Small models that between them use every part of the decoder."""

from __future__ import annotations

from dataclasses import replace

from megatron_lpa.config import ModelConfig, ProjectionConfig, ProjectionsConfig


def lowdim(
    bias: str = "default", by_layer: dict[str, int | str] | None = None, **ranks: int
) -> ProjectionsConfig:
    """Low-dimensional modules of these ranks, the other projections dense."""
    pairs = {name: ProjectionConfig("lowdim", rank, bias, by_layer) for name, rank in ranks.items()}
    return ProjectionsConfig(**pairs)


SETTING_1 = ModelConfig(
    vocab_size=64, sequence_length=12, hidden_size=32, num_layers=2, num_heads=4, ffn_hidden_size=48,
    dropout=0.0,
)  # fmt: skip
"""LayerNorm after the sublayer, ReLU, learned positions, biases everywhere."""

SETTING_2 = replace(
    SETTING_1, norm="rmsnorm", norm_eps=1e-6, norm_position="pre", final_norm=True, activation="swiglu",
    position_embedding="rope", linear_bias=False,
)  # fmt: skip
"""RMSNorm before the sublayer, SwiGLU, RoPE, no biases but the head's."""

LPA = lowdim(q=8, k=8, v=8, o=8)

MODELS = {
    "s1_transformer": SETTING_1,
    "s1_lpa": replace(SETTING_1, projections=LPA),
    "s1_low_ffn": replace(SETTING_1, projections=lowdim(up=16, down=12)),
    "s1_low_all": replace(SETTING_1, projections=lowdim(q=8, k=4, v=12, o=8, up=16, down=12)),
    "s1_prenorm": replace(SETTING_1, norm_position="pre", final_norm=True, projections=LPA),
    "s2_transformer": SETTING_2,
    "s2_lpa": replace(SETTING_2, projections=LPA),
    "s2_low_ffn": replace(SETTING_2, projections=lowdim(up=16, gate=8, down=12)),
    "s2_low_all": replace(SETTING_2, projections=lowdim(q=8, k=8, v=8, o=8, up=16, gate=16, down=16)),
    "s2_lpa_kv": replace(SETTING_2, projections=lowdim(k=8, v=4)),
    "gqa_wide_heads": replace(SETTING_2, num_heads=8, num_kv_heads=4, head_dim=6, projections=LPA),
    "tied_gelu_padded": replace(
        SETTING_1, vocab_size=61, pad_vocab_to_multiple_of=4, tie_embeddings=True, activation="gelu",
        lm_head_bias=False, projections=LPA,
    ),
    "output_biases": replace(SETTING_2, projections=lowdim(bias="output", q=8, k=4, v=8, o=8, up=16,
    down=12)),
    "both_biases_gelu_tanh": replace(
        SETTING_1, activation="gelu_tanh", projections=lowdim(bias="both", q=8, k=8, o=8, up=16, down=12),
    ),
    "latent_biases": replace(SETTING_2, projections=lowdim(bias="latent", q=8, v=8, o=8, down=12)),
    "first_layer_dense": replace(
        SETTING_1, projections=lowdim(by_layer={"0": "dense"}, q=8, k=8, v=8, o=8, up=8, down=8),
    ),
    "ranks_by_layer": replace(
        SETTING_2, num_layers=4, projections=replace(
            lowdim(by_layer={"0": 4, "2-3": 12}, q=8, k=8, o=8, gate=16),
            v=ProjectionConfig(bias="output", by_layer={"1": 8}), up=ProjectionConfig(bias="output"),
        ),
    ),
    "padded_with_bias": replace(SETTING_2, vocab_size=45, pad_vocab_to_multiple_of=32, projections=LPA),
}  # fmt: skip
