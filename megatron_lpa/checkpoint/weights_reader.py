"""A checkpoint's unsharded weights in one process; needs neither DeepSpeed nor a process group."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from pathlib import Path

import torch

from megatron_lpa.checkpoint.tensor_reader import TensorFiles
from megatron_lpa.checkpoint.weights_files import weights_in
from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.errors import UserError
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
