"""Checkpoints rewritten for a named layout, by one process without DeepSpeed.

No run needs this to continue: every process reads the ranges that its layout asks for (``resume.py``). A
conversion moves a checkpoint: the files of the state are cut as the processes of the target read them, so
that each opens its own, and the weights may change their precision.

``lowdim_layout`` counts for this: it decides which dimension of a low-dimensional module's W_B is split, so a
state cut for the other layout would have every process read a part of every file again.

The state is cut as ZeRO stage 0 saves it: the file of rank ``dp_rank * T + tp_rank`` holds an equal part of
every parameter. Files of ZeRO-3 would be equally large; what a process of a run holds depends on DeepSpeed's
padding, so nothing is gained by imitating a stage. Memory: a few times the largest parameter's part of a
file, or the largest parameter in ``weights/``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

import megatron_lpa
from megatron_lpa.checkpoint.convert_source import Parameter, Source, SourceState
from megatron_lpa.checkpoint.manifest import WrittenFile, layout_in, sealed, verify_files
from megatron_lpa.checkpoint.new_folder import new_folder
from megatron_lpa.checkpoint.tensor_file import (
    SHARD_BYTES,
    LazyTensor,
    fragment_key,
    shard_name,
    weights_name,
    write_index,
    write_lazily,
)
from megatron_lpa.checkpoint.training_state import MASTER
from megatron_lpa.config.precision import PRECISIONS
from megatron_lpa.errors import UserError
from megatron_lpa.files import write_whole
from megatron_lpa.model.dtypes import DTYPES
from megatron_lpa.run_folder import CHECKPOINT, MANIFEST, checkpoint_name


@dataclass(frozen=True)
class TargetLayout:
    """What a state is cut for.

    Args:
        tp_size: tensor-parallel size.
        dp_size: data-parallel size.
        lowdim_layout: ``column_row`` or ``latent``.
    """

    tp_size: int
    dp_size: int
    lowdim_layout: str

    @classmethod
    def of(cls, source: Source) -> TargetLayout:
        """That of the source itself."""
        saved = layout_in(source.manifest)
        return cls(saved["tensor_parallel_size"], saved["data_parallel_size"], saved["lowdim_layout"])


@dataclass(frozen=True)
class Converted:
    """What was written.

    Args:
        folder: the new folder.
        files: how many files.
        bytes: their length together.
    """

    folder: Path
    files: int
    bytes: int


def convert(
    source: Source, output: Path, layout: TargetLayout, weights_dtype: str | None = None
) -> Converted:
    """Write the source's state and weights as a complete checkpoint for ``layout``.

    Masters and moments keep every bit. The weights are made from the masters, as training makes those that
    compute.

    Args:
        source: a verified checkpoint.
        output: the new folder. A name ``step_NNNNNNNN`` has to be that of the source's step.
        layout: what to cut the files for.
        weights_dtype: ``bf16`` or ``fp32``; None keeps the source's.

    Raises:
        UserError: a layout that does not divide the model, an output that exists or has the name of another
            step, a damaged source, or a disk that cannot hold the result.
    """
    parameters = source.parameters(layout.lowdim_layout)
    _check_sizes(parameters, layout)
    step_name = checkpoint_name(source.progress.step)
    if re.fullmatch(CHECKPOINT, output.name) and output.name != step_name:
        raise UserError(f"{output}: the checkpoint is of step {source.progress.step}; call it {step_name}")
    precision = source.manifest["config"]["train"]["precision"]
    dtype = DTYPES[weights_dtype or PRECISIONS[precision].weights]
    needed = sum(p.elements for p in parameters) * (4 * len(source.kinds) + dtype.itemsize)
    state = source.open_state()
    with new_folder(output, needed) as partial:
        files = [
            write_lazily(partial, f"state/rank_{rank:05d}.safetensors", list(pieces))
            for rank, pieces in _state_files(source, state, parameters, layout)
        ]
        files += _write_weights(partial, state, parameters, dtype)
        manifest = _manifest(source, parameters, layout, files)
        verify_files(partial, manifest, manifest["files"])
        text = json.dumps(manifest, indent=1)
        write_whole(partial / MANIFEST, text)
    return Converted(output, len(files) + 1, sum(file.bytes for file in files) + len(text.encode()))


def _check_sizes(parameters: list[Parameter], layout: TargetLayout) -> None:
    for key, size in (("tensor", layout.tp_size), ("data", layout.dp_size)):
        if size < 1:
            raise UserError(f"--{key}-parallel-size {size}: has to be 1 or more")
    for parameter in parameters:
        if parameter.tp_dim is not None and parameter.shape[parameter.tp_dim] % layout.tp_size:
            raise UserError(
                f"--tensor-parallel-size {layout.tp_size} does not divide dimension {parameter.tp_dim} of "
                f"{parameter.name}, which has {parameter.shape[parameter.tp_dim]}; choose a divisor of it. "
                "If it is the vocabulary, resume with another model.pad_vocab_to_multiple_of: that needs no "
                "conversion"
            )


def _state_files(
    source: Source, state: SourceState, parameters: list[Parameter], layout: TargetLayout
) -> Iterator[tuple[int, Iterator[LazyTensor]]]:
    """For each file its rank and its fragments."""
    for dp_rank in range(layout.dp_size):
        for tp_rank in range(layout.tp_size):
            rank = dp_rank * layout.tp_size + tp_rank
            yield rank, _fragments(source, state, parameters, layout, tp_rank, dp_rank)


def _fragments(
    source: Source,
    state: SourceState,
    parameters: list[Parameter],
    layout: TargetLayout,
    tp_rank: int,
    dp_rank: int,
) -> Iterator[LazyTensor]:
    """What one rank's file holds: its part of its own shards, and of the parameters that no rank splits."""
    for parameter in parameters:
        if parameter.tp_dim is None:  # all ranks share it, else those with the same shard
            tp_size, copy, copies = 1, dp_rank * layout.tp_size + tp_rank, layout.dp_size * layout.tp_size
        else:
            tp_size, copy, copies = layout.tp_size, dp_rank, layout.dp_size
        length = parameter.elements // tp_size
        start, end = length * copy // copies, length * (copy + 1) // copies
        if start == end:
            continue
        shard = shard_name(parameter.tp_dim, tp_rank, layout.tp_size)
        for kind in source.kinds:
            # A parameter that is not split has one shard, whatever the rank that asks.
            read = functools.partial(state.shard, parameter, kind, tp_rank, tp_size, start, end)
            key = fragment_key(parameter.name, kind, shard, start)
            yield LazyTensor(key, (end - start,), torch.float32, read)


def _write_weights(
    partial: Path,
    state: SourceState,
    parameters: list[Parameter],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> list[WrittenFile]:
    """Files and index as training writes them, so that what reads a run's weights reads these."""
    groups: list[list[LazyTensor]] = [[]]
    for parameter in parameters:
        if sum(lazy.bytes for lazy in groups[-1]) >= shard_bytes:
            groups.append([])
        make = functools.partial(_weight, state, parameter, dtype)
        groups[-1].append(LazyTensor(parameter.name, parameter.shape, dtype, make))
    files = [
        write_lazily(partial / "weights", weights_name(number, len(groups)), group, {"format": "pt"})
        for number, group in enumerate(groups, start=1)
    ]
    if len(files) > 1:
        files.append(
            write_index(partial / "weights", files, [[lazy.key for lazy in group] for group in groups])
        )
    return [WrittenFile(f"weights/{file.name}", file.bytes, file.sha256) for file in files]


def _weight(state: SourceState, parameter: Parameter, dtype: torch.dtype) -> torch.Tensor:
    return state.whole(parameter, MASTER).to(dtype)


def _manifest(
    source: Source, parameters: list[Parameter], layout: TargetLayout, files: list[WrittenFile]
) -> dict[str, Any]:
    """The source's, with the new layout and files; ``converted`` keeps what it was before."""
    saved = source.manifest
    content = {key: value for key, value in saved.items() if key not in ("checksum", "files")}
    return sealed(
        {
            **content,
            "progress": dataclasses.asdict(source.progress),
            "layout": {
                **saved["layout"],
                "tensor_parallel_size": layout.tp_size,
                "data_parallel_size": layout.dp_size,
                "lowdim_layout": layout.lowdim_layout,
            },
            "state": {
                **saved["state"],
                "parameters": {p.name: {"shape": list(p.shape), "tp_dim": p.tp_dim} for p in parameters},
            },
            "converted": {
                "layout": saved["layout"],
                "versions": {
                    "megatron_lpa": megatron_lpa.__version__,
                    "torch": torch.__version__,
                    "safetensors": safetensors.__version__,
                },
            },
            "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files},
        }
    )
