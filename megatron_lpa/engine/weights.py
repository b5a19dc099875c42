"""Unsharded weights as safetensors, written from any layout; ``weights_reader`` reads them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lpa.checkpoint.manifest import WrittenFile
from megatron_lpa.checkpoint.store import write_durably
from megatron_lpa.checkpoint.tensor_file import write_tensors
from megatron_lpa.checkpoint.weights_files import INDEX, SHARD_BYTES, SINGLE, index_text, weights_name
from megatron_lpa.checkpoint.weights_reader import load_decoder
from megatron_lpa.engine.build import Engine, gathered_for_reading
from megatron_lpa.files import fsync_folder
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.parallel.sharding import merge, spec_of

__all__ = [
    "INDEX", "SHARD_BYTES", "SINGLE", "copied_weights", "gathered_weights", "load_decoder", "unsharded", "write_weights",
]  # fmt: skip


def gathered_weights(engine: Engine) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every parameter's name and unsharded value, on the CPU of rank 0 and None on others.

    Every rank has to go through all of them: each is gathered by a collective.
    """
    for name, parameter in named_parameters_once(engine.module):
        yield name, unsharded(engine, parameter)


def copied_weights(engine: Engine) -> list[tuple[str, torch.Tensor | None]]:
    """All that ``gathered_weights`` yields. Where memory is short, other ranks are not left waiting in a collective.

    Raises:
        RuntimeError: the CPU's memory of rank 0 is too small, there alone.
    """
    copies: list[tuple[str, torch.Tensor | None]] = []
    failure: RuntimeError | None = None
    for name, parameter in named_parameters_once(engine.module):
        full = _gathered(engine, parameter)
        if failure is None:
            try:
                copies.append((name, None if full is None else full.cpu()))
            except RuntimeError as error:
                failure = error
                copies.clear()
    if failure is not None:
        raise failure
    return copies


def write_weights(
    weights: Iterable[tuple[str, torch.Tensor | None]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> list[WrittenFile]:
    """Write unsharded weights, without a second copy of more than ``shard_bytes`` and one parameter.

    Several files come with an index in the format of Hugging Face's sharded checkpoints.

    Args:
        weights: what ``gathered_weights`` yields, or a list of it. Gone through to the end even after a failure,
            or other ranks would wait in a collective. Where all values are None nothing is written.
        folder: where to.
        shard_bytes: length of a file from which on another is begun.

    Returns:
        The files, named inside ``folder``.

    Raises:
        OSError: a file could not be written.
    """
    failure: OSError | None = None
    files: list[WrittenFile] = []
    names_in: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        name = f"part-{len(files):05d}.safetensors"
        files.append(write_tensors(folder, name, list(pending.items()), {"format": "pt"}))
        names_in.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, full in weights:
        if full is None or failure is not None:
            continue
        try:
            pending[name] = full
            pending_bytes += full.numel() * full.element_size()
            if pending_bytes >= shard_bytes:
                flush()
        except OSError as error:
            failure = error
            pending.clear()
    try:
        if failure is None and pending:
            flush()
        if failure is None and files:
            return _name_files(folder, files, names_in)
    except OSError as error:
        failure = error
    if failure is not None:
        raise OSError(f"{folder}: {failure}")
    return []


def _name_files(folder: Path, files: list[WrittenFile], names_in: list[list[str]]) -> list[WrittenFile]:
    count = len(files)
    renamed = []
    for number, file in enumerate(files, start=1):
        name = weights_name(number, count)
        (folder / file.name).rename(folder / name)
        renamed.append(dataclasses.replace(file, name=name))
    if count > 1:
        index = index_text(renamed, names_in)
        write_durably(folder / INDEX, index)
        renamed.append(WrittenFile(INDEX, len(index), hashlib.sha256(index.encode()).hexdigest()))
    fsync_folder(folder)
    return renamed


def unsharded(engine: Engine, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The unsharded value on the CPU of rank 0, None on other ranks; every rank calls it."""
    full = _gathered(engine, parameter)
    return None if full is None else full.cpu()


def _gathered(engine: Engine, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The same on rank 0's device, with memory of its own."""
    groups, spec = engine.groups, spec_of(parameter)
    with gathered_for_reading(engine, parameter), torch.no_grad():
        own = parameter.detach().clone().contiguous()
    if groups.tp_size == 1 or spec.tp_dim is None:
        return own if groups.rank == 0 else None
    if groups.dp_rank != 0:
        return None
    parts = [torch.empty_like(own) for _ in range(groups.tp_size)]
    dist.all_gather(parts, own, group=groups.tp_group)
    return merge(parts, spec).contiguous() if groups.rank == 0 else None
