"""Reading a checkpoint's unsharded weights in one process, without a process group."""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Collection
from pathlib import Path

import torch

from megatron_lpa.checkpoint.manifest import DamagedCheckpoint, size_of, undamaged
from megatron_lpa.checkpoint.tensor_file import INDEX, SINGLE
from megatron_lpa.checkpoint.tensor_reader import TensorFiles
from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.errors import UserError
from megatron_lpa.files import read_json
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups


def load_decoder(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    kernels: KernelConfig = KernelConfig(),  # noqa: B008 - frozen
    listed: Collection[str] | None = None,
    autocast: torch.dtype | None = None,
) -> Decoder:
    """A decoder in this process with the weights of a checkpoint's ``weights`` folder, in eval mode.

    Args:
        folder: the folder.
        model: what the weights are of.
        dtype: of the decoder's parameters.
        kernels: which kernels it uses.
        listed: as in ``weights_in``.
        autocast: as for ``Decoder``.

    Raises:
        UserError: missing or damaged files, or weights of another model.
        TryAgain: the disk does not give a file.
    """
    decoder = Decoder(model, ParallelGroups.single(), kernels=kernels, autocast=autocast)
    decoder.to(dtype).eval()
    expected = dict(named_parameters_once(decoder))
    seen: set[str] = set()
    files = TensorFiles()
    for path in weights_in(folder, listed):
        for name, stored in files.header(path).items():
            if name not in expected or tuple(expected[name].shape) != stored.shape:
                raise UserError(
                    f"{path}: {reprlib.repr(name)} of shape {stored.shape} does not fit the model"
                )
            seen.add(name)
            with torch.no_grad():
                expected[name].copy_(files.read(path, stored))
    missing = sorted(expected.keys() - seen)
    if missing:
        raise UserError(
            f"{folder}: weights of {missing[0]} and {len(missing) - 1} more parameters are missing"
        )
    return decoder


def weights_in(folder: Path, listed: Collection[str] | None = None) -> list[Path]:
    """The files of a ``weights`` folder that hold parameters.

    Args:
        folder: the folder.
        listed: names inside it that may be read, as their contents have been compared with hashes; None
            allows all.

    Raises:
        DamagedCheckpoint: an index of something else, or one that names what is no regular file of the
            folder.
        TryAgain: the disk does not give a file.
        UserError: there are no weights.
    """
    there = [name for name in (SINGLE, INDEX) if listed is None or name in listed]
    there = [
        name
        for name in there
        if undamaged(functools.partial(size_of, folder / name), folder / name) is not None
    ]
    if not there:
        raise UserError(f"{folder}: no weights here; expected {SINGLE} or {INDEX}, as a regular file")
    if there[0] == SINGLE:
        return [folder / SINGLE]
    index = folder / INDEX
    content = undamaged(functools.partial(read_json, index), index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise DamagedCheckpoint(f"{index}: damaged: no index with a weight_map of parameters and file names")
    for name in sorted(set(names)):
        path = folder / name
        inside = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors", name)
        if (
            not inside
            or (listed is not None and name not in listed)
            or undamaged(functools.partial(size_of, path), path) is None
        ):
            raise DamagedCheckpoint(
                f"{index}: damaged: it names {reprlib.repr(name)}, which is no file of this checkpoint's "
                "weights"
            )
    return [folder / name for name in sorted(set(names))]
