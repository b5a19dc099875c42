"""Unsharded weights as safetensors, written from any layout; ``weights_reader`` reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_lpa.engine.build import Engine, gathered_for_reading
from megatron_lpa.engine.weights_reader import INDEX, SINGLE, load_decoder
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.parallel.sharding import merge, spec_of

SHARD_BYTES = 4 << 30

__all__ = ["INDEX", "SHARD_BYTES", "SINGLE", "load_decoder", "unsharded", "write_weights"]


def write_weights(engine: Engine, folder: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the unsharded weights from rank 0; every rank calls it.

    Rank 0 holds at most ``shard_bytes`` (plus one parameter) in CPU memory. Several files come with an
    index in the format of Hugging Face's sharded checkpoints.

    Returns:
        The files that this rank wrote.
    """
    writer = engine.groups.rank == 0
    failure: Exception | None = None
    shards: list[dict[str, torch.Tensor]] = []
    files: list[Path] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        path = folder / f"part-{len(files):05d}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        files.append(path)
        shards.append({name: torch.empty(0) for name in pending})
        pending, pending_bytes = {}, 0

    for name, parameter in named_parameters_once(engine.module):
        full = unsharded(engine, parameter)
        if not writer or failure is not None:
            continue
        assert full is not None
        # A rank that stops here would leave the others in a collective: remember, and raise at the end.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pending[name] = full
            pending_bytes += full.numel() * full.element_size()
            if pending_bytes >= shard_bytes:
                flush()
        except (OSError, SafetensorError) as error:
            failure = error
    if not writer:
        return []
    if failure is None:
        try:
            if pending:
                flush()
            return _name_files(folder, files, shards)
        except (OSError, SafetensorError) as error:
            failure = error
    raise OSError(f"{folder}: {failure}")


def _name_files(folder: Path, files: list[Path], shards: list[dict[str, torch.Tensor]]) -> list[Path]:
    if len(files) == 1:
        return [files[0].rename(folder / SINGLE)]
    renamed = [
        path.rename(folder / f"model-{number:05d}-of-{len(files):05d}.safetensors")
        for number, path in enumerate(files, start=1)
    ]
    weight_map = {name: path.name for path, shard in zip(renamed, shards, strict=True) for name in shard}
    total = sum(path.stat().st_size for path in renamed)
    index = folder / INDEX
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    return [*renamed, index]


def unsharded(engine: Engine, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The unsharded value on the CPU of rank 0, None on other ranks; every rank calls it."""
    groups, spec = engine.groups, spec_of(parameter)
    with gathered_for_reading(engine, parameter), torch.no_grad():
        own = parameter.detach().clone().contiguous()
    if groups.tp_size == 1 or spec.tp_dim is None:
        return own.cpu() if groups.rank == 0 else None
    if groups.dp_rank != 0:
        return None
    parts = [torch.empty_like(own) for _ in range(groups.tp_size)]
    dist.all_gather(parts, own, group=groups.tp_group)
    return merge(parts, spec).cpu().contiguous() if groups.rank == 0 else None
