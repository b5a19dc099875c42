"""Checkpoints without any training: a state of random numbers, cut at random places and spread over random
files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_lpa.checkpoint.convert import TargetLayout, convert
from megatron_lpa.checkpoint.convert_source import find_source
from megatron_lpa.checkpoint.manifest import sealed
from megatron_lpa.checkpoint.progress import Progress, SampleOrder
from megatron_lpa.checkpoint.store import partial_of, publish
from megatron_lpa.checkpoint.tensor_file import fragment_key, shard_name, write_tensors
from megatron_lpa.checkpoint.universal import write_universal
from megatron_lpa.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import merge, spec_of, split
from megatron_lpa.run_folder import MANIFEST
from megatron_lpa.structures.parameter_spec import ParameterSpec

KINDS = ("master", "exp_avg", "exp_avg_sq")
State = dict[tuple[str, str], torch.Tensor]


def specs_of(model: ModelConfig, lowdim: str) -> dict[str, ParameterSpec]:
    decoder = Decoder(model, ParallelGroups.single(), lowdim)
    return {name: spec_of(parameter) for name, parameter in named_parameters_once(decoder)}


def random_checkpoint(
    folder: Path,
    model: ModelConfig,
    step: int = 7,
    tp_size: int = 2,
    files: int = 3,
    lowdim: str = "latent",
    precision: str = "bf16",
    optimizer_step: int = 5,
    seed: int = 0,
) -> State:
    """Write ``folder / step_NNNNNNNN``; returns the unsharded masters and moments that it holds."""
    cuts, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    specs = specs_of(model, lowdim)
    state: State = {}
    contents: list[list[tuple[str, torch.Tensor]]] = [[] for _ in range(files)]
    for (name, spec), kind in itertools.product(specs.items(), KINDS if optimizer_step else KINDS[:1]):
        full = torch.randn(spec.shape, generator=generator)
        state[name, kind] = full
        for tp_rank in range(1 if spec.tp_dim is None else tp_size):
            shard = split(full, spec, tp_rank, tp_size).reshape(-1)
            ends = sorted({0, *cuts.choices(range(shard.numel()), k=3), shard.numel()})
            for start, end in itertools.pairwise(ends):
                key = fragment_key(name, kind, shard_name(spec.tp_dim, tp_rank, tp_size), start)
                cuts.choice(contents).append((key, shard[start:end].clone()))
    final = folder / f"step_{step:08d}"
    partial = partial_of(final)
    partial.mkdir(parents=True, exist_ok=True)
    written = [
        write_tensors(partial, f"state/rank_{rank:05d}.safetensors", tensors)
        for rank, tensors in enumerate(contents)
    ]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = [(name, state[name, "master"].to(dtype)) for name in specs]
    written.append(write_tensors(partial, "weights/model.safetensors", weights, {"format": "pt"}))
    run = RunConfig(
        model=model, parallel=ParallelConfig(tp_size, lowdim), train=TrainConfig(steps=9, precision=precision)
    )
    manifest = {
        "format": 1,
        "versions": {"megatron_lpa": "0", "torch": "0", "deepspeed": "0.19.8", "safetensors": "0"},
        "progress": dataclasses.asdict(Progress(step, 8 * step, 99 * step, 8)),
        "validation_loss": 2.5,
        "decisions": {"skipped_in_a_row": 2, "losses": [3.5, 0.30000000000000004], "rollbacks": 1},
        "layout": {
            "tensor_parallel_size": tp_size, "data_parallel_size": 2, "lowdim_layout": lowdim,
            "zero_stage": 2,
            "precision": precision, "micro_batch_size": 4,
        },
        "order": dataclasses.asdict(SampleOrder(27, 1000, 8, {"hash": "abc"})),
        "model": dataclasses.asdict(model),
        "config": dataclasses.asdict(run),
        "state": {
            "format": 1, "optimizer": "AdamW", "optimizer_step": optimizer_step, "skipped_steps": 2,
            "parameters": {n: {"shape": list(s.shape), "tp_dim": s.tp_dim} for n, s in specs.items()},
        },
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in written},
    }  # fmt: skip
    publish(final, json.dumps(sealed(manifest)))
    return state


def reassembled(checkpoint: Path, model: ModelConfig, tp_size: int, lowdim: str) -> State:
    """The unsharded state from the files and their keys alone. Asserts that it holds every element once."""
    specs = specs_of(model, lowdim)
    pieces: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    for path in sorted((checkpoint / "state").iterdir()):
        for key, value in load_file(path).items():
            name, kind, shard, start = key.split("/")
            of_shard = pieces.setdefault((name, kind, shard), {})
            assert int(start) not in of_shard, key
            of_shard[int(start)] = value
    state: State = {}
    kinds = sorted({kind for _, kind, _ in pieces})
    for (name, spec), kind in itertools.product(specs.items(), kinds):
        split_up = spec.tp_dim is not None and tp_size > 1
        shards = []
        for shard in [str(rank) for rank in range(tp_size)] if split_up else ["whole"]:
            found = pieces.pop((name, kind, shard))
            ends = list(itertools.accumulate(len(found[start]) for start in sorted(found)))
            assert sorted(found) == [0, *ends[:-1]], (name, kind, shard)
            whole = torch.cat([found[start] for start in sorted(found)])
            shards.append(whole.view(spec.local_shape(tp_size if split_up else 1)))
        state[name, kind] = merge(shards, spec) if split_up else shards[0]
    assert not pieces, sorted(pieces)
    return state


def flip_bit(path: Path) -> None:
    """Damage one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def manifest_of(checkpoint: Path) -> dict[str, object]:
    """The manifest as it is in the file."""
    found: dict[str, object] = json.loads((checkpoint / MANIFEST).read_text())
    return found


def convert_in(
    folder: Path, output: Path, tp: int = 1, dp: int = 2, lowdim: str = "latent", **more: str
) -> None:
    convert(find_source(folder), output, TargetLayout(tp, dp, lowdim), **more)


def universal_in(source: Path, output: Path) -> None:
    write_universal(find_source(source), output)
