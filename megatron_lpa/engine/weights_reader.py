"""A checkpoint's unsharded weights in one process; needs neither DeepSpeed nor a process group."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.engine.weights_files import INDEX, SINGLE
from megatron_lpa.errors import UserError
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups


def load_decoder(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    kernels: KernelConfig = KernelConfig(),  # noqa: B008 - frozen
) -> Decoder:
    """A decoder in this process with the weights of a checkpoint's ``weights`` folder, in eval mode.

    Raises:
        UserError: missing or damaged files, or weights of another model.
    """
    decoder = Decoder(model, ParallelGroups.single(), kernels=kernels).to(dtype).eval()
    expected = dict(named_parameters_once(decoder))
    single = folder / SINGLE
    try:
        if single.is_file():
            names = [SINGLE]
        else:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        seen: set[str] = set()
        for file_name in names:
            with safe_open(folder / file_name, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    seen.add(name)
                    value = file.get_tensor(name)
                    if name not in expected or expected[name].shape != value.shape:
                        raise UserError(
                            f"{folder / file_name}: {name} of shape {tuple(value.shape)} does not fit the model"
                        )
                    with torch.no_grad():
                        expected[name].copy_(value)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no weights here ({error}); expected {SINGLE} or {INDEX}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: damaged weights: {error}") from error
    missing = sorted(expected.keys() - seen)
    if missing:
        raise UserError(
            f"{folder}: weights of {missing[0]} and {len(missing) - 1} more parameters are missing"
        )
    return decoder
