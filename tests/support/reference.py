"""An independent decoder: plain float64 arithmetic on a dictionary of unsharded parameters.

Shares no code with the package. Written from the paper's formulas: no fused operations, no modules, no
collectives; attention is an explicit softmax over a masked score matrix.
"""

from __future__ import annotations

import math

import torch

from megatron_lpa.config import ModelConfig

Weights = dict[str, torch.Tensor]


def project(x: torch.Tensor, w: Weights, prefix: str) -> torch.Tensor:
    """One linear, dense or a pair, by whichever parameters exist."""
    if f"{prefix}weight" in w:
        y = x @ w[f"{prefix}weight"].T
        return y + w[f"{prefix}bias"] if f"{prefix}bias" in w else y
    latent = x @ w[f"{prefix}w_a"].T
    if f"{prefix}bias_a" in w:
        latent = latent + w[f"{prefix}bias_a"]
    y = latent @ w[f"{prefix}w_b"].T
    return y + w[f"{prefix}bias_b"] if f"{prefix}bias_b" in w else y


def norm(x: torch.Tensor, w: Weights, prefix: str, model: ModelConfig) -> torch.Tensor:
    if model.norm == "rmsnorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + model.norm_eps) * w[f"{prefix}weight"]
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + model.norm_eps) * w[f"{prefix}weight"] + w[f"{prefix}bias"]


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """(B, heads, S, E): pairs (i, i + E/2) turn by position * base^(-2i/E)."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([base ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=x.dtype)
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def attention(x: torch.Tensor, w: Weights, prefix: str, model: ModelConfig) -> torch.Tensor:
    width = model.head_dim or model.hidden_size // model.num_heads
    kv_heads = model.num_kv_heads or model.num_heads

    def heads(name: str, count: int) -> torch.Tensor:
        y = project(x, w, f"{prefix}qkv.{name}_")
        return y.reshape(*x.shape[:2], count, width).permute(0, 2, 1, 3)

    q, k, v = heads("q", model.num_heads), heads("k", kv_heads), heads("v", kv_heads)
    if model.position_embedding == "rope":
        q, k = rotate(q, model.rope_base), rotate(k, model.rope_base)
    k, v = (t.repeat_interleave(model.num_heads // kv_heads, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    mixed = (weights @ v).permute(0, 2, 1, 3).reshape(*x.shape[:2], -1)
    return project(mixed, w, f"{prefix}o.")


def feed_forward(x: torch.Tensor, w: Weights, prefix: str, model: ModelConfig) -> torch.Tensor:
    up = project(x, w, f"{prefix}inputs.up_")
    if model.activation == "swiglu":
        gate = project(x, w, f"{prefix}inputs.gate_")
        hidden = gate / (1 + torch.exp(-gate)) * up
    elif model.activation == "relu":
        hidden = up.clamp(min=0)
    elif model.activation == "gelu_tanh":
        hidden = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    else:
        hidden = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
    return project(hidden, w, f"{prefix}down.")


def logits(w: Weights, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Ids (B, S) -> (B, S, V) over real and padded ids, without dropout."""
    x = w["token_embedding.weight"][tokens]
    if model.position_embedding == "learned":
        x = x + w["position_embedding.weight"][: tokens.shape[1]]
    for layer in range(model.num_layers):
        prefix = f"layers.{layer}."
        for sublayer, name in ((attention, "attention"), (feed_forward, "ffn")):
            if model.norm_position == "pre":
                read = norm(x, w, f"{prefix}{name}_norm.", model)
                x = x + sublayer(read, w, f"{prefix}{name}.", model)
            else:
                written = sublayer(x, w, f"{prefix}{name}.", model)
                x = x + norm(written, w, f"{prefix}{name}_norm.", model)
    if model.final_norm:
        x = norm(x, w, "final_norm.", model)
    matrix = w["token_embedding.weight"] if model.tie_embeddings else w["head.weight"]
    scores = x @ matrix.T
    return scores + w["head.bias"] if model.lm_head_bias else scores


def token_losses(w: Weights, model: ModelConfig, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (B, S) over the real ids."""
    scores = logits(w, model, tokens)[..., : model.vocab_size]
    return torch.logsumexp(scores, -1) - scores.gather(-1, labels[..., None])[..., 0]
