"""Writing safetensors files piece by piece: no second copy in memory, and hashed on the way.

Weights may take several files; these come with an index in the format of Hugging Face's sharded checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lpa.checkpoint.manifest import WrittenFile
from megatron_lpa.files import fsync_folder, write_whole

WHOLE = "whole"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30

_ALIGNMENT = 8
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written.

    Args:
        key: its key in the file.
        shape: its shape.
        dtype: fp32 or bf16.
        make: returns it, on any device.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def shard_name(tp_dim: int | None, tp_rank: int, tp_size: int) -> str:
    """How files call a shard: its tensor-parallel rank, or ``whole``."""
    return WHOLE if tp_dim is None or tp_size == 1 else str(tp_rank)


def fragment_key(name: str, kind: str, shard: str, start: int) -> str:
    """The key of a fragment in a file."""
    return f"{name}/{kind}/{shard}/{start}"


def write_tensors(
    folder: Path,
    name: str,
    tensors: Sequence[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> WrittenFile:
    """Write fp32 and bf16 tensors to ``folder / name`` and bring them to disk; as ``write_lazily``.

    Args:
        folder: the checkpoint.
        name: path of the file inside it.
        tensors: key and value; values may be on any device.
        metadata: for the file's header.

    Raises:
        OSError: as ``write_lazily``.
    """
    lazy = [LazyTensor(key, tuple(value.shape), value.dtype, value.detach) for key, value in tensors]
    return write_lazily(folder, name, lazy, metadata)


def write_lazily(
    folder: Path,
    name: str,
    tensors: Sequence[LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> WrittenFile:
    """Write fp32 and bf16 tensors to ``folder / name``, one in memory at a time, and bring them to disk.

    ``safetensors.torch.save_file`` wants all tensors on the CPU at once, where here only one is, and makes
    files that nobody else may read, whatever the umask. The hash is of what was meant to be written, so that
    a disk that stores something else is found out.

    Args:
        folder: the checkpoint.
        name: path of the file inside it.
        tensors: what to write, in this order.
        metadata: for the file's header.

    Raises:
        OSError: the file cannot be written; what there was of it is removed at once, as a disk that it filled
            may be needed by others before the whole checkpoint is given up. What had the name before is left
            as it is.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for lazy in tensors:
        assert lazy.key not in header, lazy.key
        begin, end = end, end + lazy.bytes
        described = {"dtype": _DTYPES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [begin, end]}
        header[lazy.key] = described
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    path = folder / name
    # Not what is above: the run folder may have been moved.
    path.parent.mkdir(exist_ok=True)
    digest = hashlib.sha256()
    try:
        with open(path, "xb") as file:  # follows no link, and writes over nothing

            def write(data: bytes | memoryview) -> None:
                file.write(data)
                digest.update(data)

            write(len(text).to_bytes(8, "little"))
            write(text)
            for lazy in tensors:
                tensor = lazy.make()
                assert (tuple(tensor.shape), tensor.dtype) == (lazy.shape, lazy.dtype), lazy.key
                if tensor.numel():
                    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
                    write(flat.view(torch.uint8).numpy().data)  # bytes, as numpy has no bf16
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    except FileExistsError:
        raise
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return WrittenFile(name, size, digest.hexdigest())


def write_weights(
    weights: Iterable[tuple[str, torch.Tensor | None]], folder: Path, shard_bytes: int = SHARD_BYTES
) -> list[WrittenFile]:
    """Write unsharded weights, without a second copy of more than ``shard_bytes`` and one parameter.

    Args:
        weights: names and values, None for what other ranks write. Gone through to the end even after a
            failure, as making them may take collectives, in which other ranks would wait. Where all values
            are None nothing is written.
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
            pending[name] = full.cpu()
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
        renamed.append(write_index(folder, renamed, names_in))
    fsync_folder(folder)
    return renamed


def weights_name(number: int, count: int) -> str:
    """The name of one of ``count`` files; numbers begin at 1."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Sequence[WrittenFile], names_in: Sequence[Sequence[str]]) -> WrittenFile:
    """Write the index of several files.

    Args:
        folder: where they lie.
        files: named inside it.
        names_in: the parameters that each of them holds.

    Raises:
        OSError: it cannot be written.
    """
    weight_map = {name: file.name for file, names in zip(files, names_in, strict=True) for name in names}
    total = sum(file.bytes for file in files)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    write_whole(folder / INDEX, text)
    return WrittenFile(INDEX, len(text), hashlib.sha256(text.encode()).hexdigest())
