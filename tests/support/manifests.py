"""Manifests of checkpoints without a model behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lpa.checkpoint.manifest import sealed
from megatron_lpa.run_folder import MANIFEST


def whole_manifest(step: int, files: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Every key that a run writes, without a checksum; the model has one parameter."""
    return {
        "format": 1,
        "versions": {"megatron_lpa": "0.1.0", "torch": "2", "deepspeed": "0.19.8", "safetensors": "0.8"},
        "progress": {
            "step": step, "consumed_samples": 8 * step, "consumed_tokens": 128 * step, "skipped_samples": 0,
        },
        "validation_loss": None,
        "layout": {
            "tensor_parallel_size": 2, "data_parallel_size": 1, "lowdim_layout": "rank", "zero_stage": 3,
            "precision": "bf16", "micro_batch_size": 4,
        },
        "order": {"seed": 27, "samples_per_epoch": 1000, "samples_per_step": 8, "data": {"hash": "abc"}},
        "model": {
            "vocab_size": 64, "dropout": 0.1, "num_kv_heads": None, "tie_embeddings": False,
            "norm": "rmsnorm",
            "projections": {"q": {"kind": "lowdim", "rank": 8}},
        },
        "config": {"train": {"precision": "bf16"}},
        "state": {
            "format": 1, "optimizer": "AdamW", "optimizer_step": step, "skipped_steps": 0,
            "parameters": {"a.w": {"shape": [8, 12], "tp_dim": 0}},
        },
        "files": dict(files),
        **more,
    }  # fmt: skip


def put(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest whose checksum fits, whatever it says."""
    (checkpoint / MANIFEST).write_text(json.dumps(sealed(dict(manifest))))


def small_checkpoint(folder: Path, step: int, content: bytes = b"0123456789") -> dict[str, Any]:
    """A checkpoint of one small file that is no state; returns its manifest."""
    checkpoint = folder / f"step_{step:08d}"
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state/x").write_bytes(content)
    files = {"state/x": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    manifest = whole_manifest(step, files)
    put(checkpoint, manifest)
    return manifest
