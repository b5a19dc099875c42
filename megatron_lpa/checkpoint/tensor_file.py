"""Writing safetensors files piece by piece: no second copy in memory, and hashed on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lpa.checkpoint.manifest import WrittenFile

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
    files that nobody else may read, whatever the umask. The hash is of what was meant to be written, so that a
    disk that stores something else is found out.

    Args:
        folder: the checkpoint.
        name: path of the file inside it.
        tensors: what to write, in this order.
        metadata: for the file's header.

    Raises:
        OSError: the file cannot be written; what there was of it is removed at once, as a disk that it filled may be
            needed by others before the whole checkpoint is given up. What had the name before is left as it is.
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
