"""A checkpoint as DeepSpeed's universal folder, for other trainers on DeepSpeed; written without DeepSpeed.

The output is what ``engine.load_checkpoint(output)`` takes where the DeepSpeed configuration has
``{"checkpoint": {"load_universal": true}}``:

| path | contents |
|---|---|
| ``latest_universal`` | the name of the folder below |
| ``step_NNNNNNNN/zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt`` | ``{"param": unsharded tensor, "cat_dim": tp_dim}`` |
| ``step_NNNNNNNN/zero/<parameter>/step.pt`` | AdamW's count of steps, as ZeRO-1 and 2 read it |
| ``step_NNNNNNNN/zero/optimizer_state.pt`` | the same count, as ZeRO-3 reads it, and parameter groups without settings |
| ``step_NNNNNNNN/mp_rank_00_model_states.pt`` | counters, and our progress and model for the trainer; read by ZeRO-1 and 2 |
| ``step_NNNNNNNN/zero_pp_rank_0_mp_rank_00_model_states.pt`` | the same; read by ZeRO-3 |
| ``step_NNNNNNNN/SHA256SUMS`` | for ``sha256sum -c`` |

Three traps of DeepSpeed 0.19.8's loader decide what is in them:

* ZeRO-1 and 2 go through the trainer's and the file's parameter groups together and end with the shorter
  list, so further groups keep their initial state without a word. The file has as many groups as parameters,
  which no trainer exceeds.
* ZeRO-3 overwrites the settings of all groups with those of the file's first, weight decay with them. The
  groups of the file are empty: learning rate, betas and weight decay stay those of the trainer.
* ZeRO-3 gives one and the same object for the count of steps to all its groups. A tensor would count once for
  every group in a step, so it is a number there, as DeepSpeed's Adam has it. PyTorch's AdamW wants a tensor.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from megatron_lpa.checkpoint.convert import Converted
from megatron_lpa.checkpoint.convert_source import Parameter, Source
from megatron_lpa.checkpoint.manifest import layout_in, size_of
from megatron_lpa.checkpoint.new_folder import new_folder
from megatron_lpa.checkpoint.training_state import MASTER, MOMENTS
from megatron_lpa.files import files_below, new_file, patiently, sha256, write_whole
from megatron_lpa.run_folder import checkpoint_name

LATEST = "latest_universal"
SUMS = "SHA256SUMS"
_NAMES = {MASTER: "fp32", **{kind: kind for kind in MOMENTS}}
_FILE_OVERHEAD_BYTES = 4096
"""More than what a .pt file takes besides its tensor, with its part of SHA256SUMS; small next to the
tensors."""


def write_universal(source: Source, output: Path, lowdim_layout: str | None = None) -> Converted:
    """Write the source's masters, moments and count of steps as a universal checkpoint.

    A source without moments, of step 0, gets moments of zero: what AdamW begins with.

    Args:
        source: a verified checkpoint.
        output: the new folder.
        lowdim_layout: that of the trainer, if it splits low-dimensional modules over tensor-parallel ranks;
            None takes the source's.

    Raises:
        UserError: an output that exists, a damaged source, or a disk that cannot hold the result.
    """
    parameters = source.parameters(lowdim_layout or layout_in(source.manifest)["lowdim_layout"])
    elements = sum(parameter.elements for parameter in parameters)
    needed = 12 * elements + _FILE_OVERHEAD_BYTES * (4 * len(parameters) + 8)
    tag = checkpoint_name(source.progress.step)
    with new_folder(output, needed) as partial:
        folder = partial / tag
        sums = _write_tensors(folder, source, parameters)
        sums |= _write_counters(folder, source, len(parameters))
        for name, expected in sums.items():
            if sha256(folder / name) != expected:
                raise OSError(f"{folder / name} reads back otherwise than it was written")
        write_whole(folder / SUMS, "".join(f"{value}  {name}\n" for name, value in sums.items()))
        write_whole(partial / LATEST, tag)
        written = sum(patiently(functools.partial(size_of, path), path) or 0 for path in files_below(partial))
    return Converted(output, len(sums) + 2, written)


def _write_tensors(folder: Path, source: Source, parameters: list[Parameter]) -> dict[str, str]:
    state = source.open_state()
    sums: dict[str, str] = {}
    for parameter in parameters:
        (folder / "zero" / parameter.name).mkdir(parents=True)
        for kind, file_name in _NAMES.items():
            if kind in source.kinds:
                content = {"param": state.whole(parameter, kind)}
            else:
                content = {"param": torch.zeros(parameter.shape)}
            described = content if parameter.tp_dim is None else {**content, "cat_dim": parameter.tp_dim}
            name = f"zero/{parameter.name}/{file_name}.pt"
            sums[name] = _save(folder / name, described)
        name = f"zero/{parameter.name}/step.pt"
        sums[name] = _save(folder / name, torch.tensor(float(source.optimizer_step)))
    return sums


def _write_counters(folder: Path, source: Source, groups: int) -> dict[str, str]:
    manifest, progress = source.manifest, source.progress
    version = manifest["versions"]["deepspeed"]  # of the run whose state this is
    optimizer = {
        "ds_version": version,
        "param_groups": [{} for _ in range(groups)],
        "optimizer_state_dict": {"state": {0: {"step": source.optimizer_step}}, "param_groups": [{}]},
    }
    # The weights are not in here: a universal checkpoint has them in zero/.
    counters = {
        "module": {},
        "ds_version": version,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": progress.step,
        "global_samples": progress.consumed_samples,
        "skipped_steps": manifest["state"]["skipped_steps"],
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        "megatron_lpa": {
            "progress": dataclasses.asdict(progress),
            "model": manifest["model"],
            "order": manifest["order"],
        },
    }
    contents: dict[str, Any] = {
        "zero/optimizer_state.pt": optimizer,
        "mp_rank_00_model_states.pt": counters,
        "zero_pp_rank_0_mp_rank_00_model_states.pt": counters,
    }
    return {name: _save(folder / name, content) for name, content in contents.items()}


def _save(path: Path, content: Any) -> str:
    """Write with ``torch.save`` and bring to disk; returns the SHA-256 of what was meant to be written.

    By way of memory: ``torch.save`` itself hides a full disk behind a ``RuntimeError`` about positions in a
    file.
    """
    made = io.BytesIO()
    torch.save(content, made)
    with new_file(path) as file:
        file.write(made.getbuffer())
    return hashlib.sha256(made.getbuffer()).hexdigest()
