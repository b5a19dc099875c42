"""A small model with random weights in a run folder, as training would have left it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import save_file

from megatron_lpa.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ProjectionConfig,
    ProjectionsConfig,
    RunConfig,
    TrainConfig,
    save_config,
)
from megatron_lpa.data.tokenizers.opening import Tokenizer, load_tokenizer
from megatron_lpa.model.init import initialize, named_parameters_once
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.preparation.bpe import train_tokenizer

MODEL = ModelConfig(
    vocab_size=300,
    pad_vocab_to_multiple_of=64,
    sequence_length=16,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    ffn_hidden_size=48,
    activation="swiglu",
    norm="rmsnorm",
    norm_position="pre",
    final_norm=True,
    position_embedding="rope",
    linear_bias=False,
    dropout=0.1,
    projections=ProjectionsConfig(q=ProjectionConfig("lowdim", 8), v=ProjectionConfig("lowdim", 8)),
)

SaveRun = Callable[..., Path]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Prose of a few hundred bytes each, one with characters of several bytes."""
    return [*(text[:400] for _, text in sorted(topics.items())[:20]), "naïve café, 東京"]


@pytest.fixture(scope="session")
def tokenizer_folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    assert train_tokenizer([str(folder / "text.jsonl")], 300, str(folder / "made")) == 300
    return folder / "made"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    """Weights far from zero, and padded ids that the head alone would prefer to all real ones."""
    decoder = Decoder(MODEL, ParallelGroups.single()).eval()
    initialize(decoder, MODEL, ParallelGroups.single(), seed=3)
    with torch.no_grad():
        for name, parameter in named_parameters_once(decoder):
            if name.startswith("head") and parameter.ndim == 1:
                parameter[MODEL.vocab_size :] = 50.0
            elif name.startswith("head"):
                parameter.mul_(6.0)
    return decoder


@pytest.fixture
def save_run(decoder: Decoder, tokenizer_folder: Path) -> SaveRun:
    """Writes a run folder with complete checkpoints of the given steps; the folder."""

    def save(
        folder: Path,
        steps: tuple[int, ...] = (20,),
        tokenizer: str | None = "",
        data: DataConfig | None = None,
        facts: dict[str, object] | None = None,
    ) -> Path:
        data = dataclasses.replace(
            data or DataConfig(train_prefix="unused"),
            tokenizer=str(tokenizer_folder) if tokenizer == "" else tokenizer,
        )
        config = RunConfig(
            model=MODEL,
            data=data,
            train=TrainConfig(steps=20, precision="fp32"),
            logging=LoggingConfig(run_dir=folder.parent.name, name=folder.name),
        )
        save_config(config, folder / "config.yaml")
        for step in steps:
            checkpoint = folder / "checkpoints" / f"step_{step:08d}"
            (checkpoint / "weights").mkdir(parents=True)
            weights = checkpoint / "weights" / "model.safetensors"
            save_file({name: p.detach() + (step - 20) for name, p in named_parameters_once(decoder)}, weights)
            manifest = {
                "format": 1,
                "progress": {"step": step, "consumed_samples": 8 * step, "consumed_tokens": 128 * step},
                "layout": {
                    "tensor_parallel_size": 2,
                    "data_parallel_size": 3,
                    "lowdim_layout": "latent",
                    "zero_stage": 3,
                    "precision": "fp32",
                },
                "model": dataclasses.asdict(MODEL),
                "order": {"data": facts or {}},
                "files": {
                    "weights/model.safetensors": {
                        "bytes": weights.stat().st_size,
                        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
                    },
                    # Left behind when the model was taken away.
                    "state/rank_0.pt": {"bytes": 1, "sha256": 64 * "0"},
                },
            }
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return save
