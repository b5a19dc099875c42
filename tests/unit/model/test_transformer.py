"""The decoder against Hugging Face's Llama and GPT-2: the same weights give the same logits and loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from support import reference
from support.models import MODELS, SETTING_1, SETTING_2

from megatron_lpa.config import ModelConfig
from megatron_lpa.layers.sublayers import rope_tables
from megatron_lpa.model.init import initialize
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.ops.elementwise import apply_rope
from megatron_lpa.parallel.groups import ParallelGroups


def decoder_of(model: ModelConfig) -> Decoder:
    decoder = Decoder(model, ParallelGroups.single())
    initialize(decoder, model, ParallelGroups.single(), seed=7)
    return decoder


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_setting_2_transformer_is_llama(kv_heads):
    model = replace(SETTING_2, num_kv_heads=kv_heads, lm_head_bias=False, rope_base=500.0, norm_eps=1e-5)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=model.sequence_length,
            rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = {
        "model.embed_tokens.": "token_embedding.", "model.norm.": "final_norm.", "lm_head.": "head.",
        "model.layers.": "layers.", "self_attn.o_proj.": "attention.o.", "mlp.down_proj.": "ffn.down.",
        "self_attn.q_proj.": "attention.qkv.q_", "self_attn.k_proj.": "attention.qkv.k_",
        "self_attn.v_proj.": "attention.qkv.v_", "mlp.up_proj.": "ffn.inputs.up_",
        "mlp.gate_proj.": "ffn.inputs.gate_", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = {}
    for name, value in llama.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = value
    decoder = Decoder(model, ParallelGroups.single())
    decoder.load_state_dict(state, strict=True)
    ids = torch.randint(model.vocab_size, (2, model.sequence_length))
    expected = llama(ids, labels=ids)
    torch.testing.assert_close(decoder(ids), expected.logits, rtol=1e-4, atol=1e-4)
    losses = decoder(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(losses.mean(), expected.loss, rtol=1e-5, atol=1e-5)


def test_tied_pre_norm_gelu_decoder_with_biases_is_gpt2():
    model = replace(
        SETTING_1,
        norm_position="pre",
        final_norm=True,
        activation="gelu",
        tie_embeddings=True,
        lm_head_bias=False,
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.vocab_size, n_positions=model.sequence_length, n_embd=model.hidden_size,
            n_layer=model.num_layers, n_head=model.num_heads, n_inner=model.ffn_hidden_size,
            activation_function="gelu", attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    for parameter in gpt2.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = gpt2.state_dict()
    state = {
        "token_embedding.weight": theirs["transformer.wte.weight"],
        "head.weight": theirs["transformer.wte.weight"],
        "position_embedding.weight": theirs["transformer.wpe.weight"],
    }
    for part in ("weight", "bias"):
        state[f"final_norm.{part}"] = theirs[f"transformer.ln_f.{part}"]
        for layer in range(model.num_layers):
            old, new = f"transformer.h.{layer}.", f"layers.{layer}."
            state[f"{new}attention_norm.{part}"] = theirs[f"{old}ln_1.{part}"]
            state[f"{new}ffn_norm.{part}"] = theirs[f"{old}ln_2.{part}"]
            # GPT-2 stores matrices as (d_in, d_out), and q, k, v side by side.
            joined = theirs[f"{old}attn.c_attn.{part}"].t()
            for name, value in zip("qkv", joined.chunk(3), strict=True):
                state[f"{new}attention.qkv.{name}_{part}"] = value
            state[f"{new}attention.o.{part}"] = theirs[f"{old}attn.c_proj.{part}"].t()
            state[f"{new}ffn.inputs.up_{part}"] = theirs[f"{old}mlp.c_fc.{part}"].t()
            state[f"{new}ffn.down.{part}"] = theirs[f"{old}mlp.c_proj.{part}"].t()
    decoder = Decoder(model, ParallelGroups.single())
    decoder.load_state_dict(state, strict=True)
    ids = torch.randint(model.vocab_size, (2, model.sequence_length))
    torch.testing.assert_close(decoder(ids), gpt2(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_never_sees_the_future(name):
    model = MODELS[name]
    decoder = decoder_of(model).eval()
    ids = torch.randint(model.vocab_size, (1, model.sequence_length))
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % model.vocab_size
    first, second = decoder(ids), decoder(changed)
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.equal(first[:, 7:], second[:, 7:])


def test_shorter_inputs_give_the_prefix_of_longer_ones():
    decoder = decoder_of(SETTING_2).eval()
    ids = torch.randint(SETTING_2.vocab_size, (2, SETTING_2.sequence_length))
    whole = decoder(ids)
    torch.testing.assert_close(decoder(ids[:, :5]), whole[:, :5], rtol=1e-4, atol=1e-5)


def test_rope_tables_serve_positions_beyond_the_sequence_length():
    x = torch.randn(1, 2, 40, 8, dtype=torch.float64)
    cos, sin = rope_tables(40, 8, 10000.0, torch.device("cpu"))
    torch.testing.assert_close(apply_rope(x, cos, sin), reference.rotate(x, 10000.0), rtol=1e-6, atol=1e-6)


def test_dropout_scales_and_only_acts_in_training():
    model = replace(SETTING_1, dropout=0.5)
    decoder = decoder_of(model)
    ids = torch.randint(model.vocab_size, (2, model.sequence_length))
    decoder.eval()
    exact = {name: p.detach().double() for name, p in decoder.named_parameters()}
    torch.testing.assert_close(
        decoder(ids).double(), reference.logits(exact, model, ids), rtol=1e-4, atol=1e-4
    )
    decoder.train()
    assert not torch.equal(decoder(ids), decoder(ids))


def test_a_decoder_used_in_inference_mode_can_be_trained_afterwards():
    decoder = decoder_of(SETTING_2)
    ids = torch.randint(SETTING_2.vocab_size, (2, 9))
    with torch.inference_mode():
        decoder.eval()(ids)
    decoder.train()(ids[:, :-1], ids[:, 1:]).mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters())
