"""The models of the paper's public code, from a copy of it that lies beside the benchmarks and is no part of
them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.commands import ROOT
from megatron_lpa.config import ModelConfig
from megatron_lpa.errors import UserError
from megatron_lpa.planning.parameters import count_parameters

FOLDER = ROOT / "build" / "LPA"
CLONE = "git clone https://github.com/TsinghuaC3I/LPA build/LPA"


def official_file(model: ModelConfig) -> Path:
    """The public code's file for a model: it has one for Setting 1 (LayerNorm) and one for Setting 2
    (RMSNorm).

    Raises:
        UserError: there is no copy of the public code.
    """
    path = FOLDER / "architecture" / f"lpa_setting{1 if model.norm == 'layernorm' else 2}.py"
    if not path.is_file():
        raise UserError(f"the loop official needs {path}: get the paper's public code with {CLONE!r}")
    return path


def official_model(model: ModelConfig) -> nn.Module:
    """The public code's ``LPAForCausalLM`` of these sizes: ``(input_ids, labels)`` (B, S) -> ``[mean loss]``.

    Raises:
        UserError: there is no copy of the public code, or it has no such model.
    """
    path = official_file(model)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    low_attention, attention_rank = _low(model, ("q", "k", "v", "o"))
    low_ffn, ffn_rank = _low(
        model, ("up", "gate", "down") if model.activation == "swiglu" else ("up", "down")
    )
    sizes: dict[str, Any] = {} if model.norm == "rmsnorm" else {"dropout": model.dropout}
    module = code.LPAForCausalLM(
        vocab_size=model.vocab_size,
        embed_dim=model.hidden_size,
        ffn_dim=model.ffn_hidden_size,
        num_heads=model.num_heads,
        head_dim=model.head_width,
        attn_lowdim=attention_rank,
        ffn_lowdim=ffn_rank,
        num_layers=model.num_layers,
        seq_len=model.sequence_length,
        low_attn=low_attention,
        low_ffn=low_ffn,
        **sizes,
    )
    found, wanted = sum(p.numel() for p in module.parameters()), count_parameters(model).total
    if found != wanted:
        raise UserError(
            f"the paper's public code has no such model: its own has {found} parameters, this one {wanted}; "
            "take a preset of Setting 1 or 2"
        )
    return module


def _low(model: ModelConfig, names: tuple[str, ...]) -> tuple[str, int]:
    """The public code's switch and rank for some projections; with a rank for each, the count of parameters
    differs."""
    first = getattr(model.projections, names[0])
    return ("yes", first.rank) if first.kind == "lowdim" else ("no", 1)
