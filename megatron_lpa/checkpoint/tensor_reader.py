"""Reading safetensors files by system calls, for a state as for weights.

Read through a mapping, an error of the disk is SIGBUS: it ends the process without a word about the file.
Here it is an exception, and the disk is asked again. A header says nothing that is not checked: it may be a
stranger's.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_lpa.checkpoint.manifest import undamaged
from megatron_lpa.files import UnusableFile, open_regular

MOST_HEADER_BYTES = 100_000_000
"""What the safetensors library reads too."""

MOST_OPEN = 64
"""Files at a time: a checkpoint may have more than a process may open."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Args:
        dtype: a floating-point type.
        shape: its shape.
        offset: of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class TensorFiles:
    """Safetensors files of a checkpoint; those last read stay open."""

    def __init__(self) -> None:
        self._open: dict[Path, BinaryIO] = {}

    def header(self, path: Path) -> dict[str, Stored]:
        """What a file holds.

        Raises:
            DamagedCheckpoint: it is missing, no regular file, or no safetensors file of floating-point
                tensors.
            TryAgain: the disk does not give it.
            UserError: it must not be read.
        """
        return undamaged(functools.partial(_header, path), path)

    def read(self, path: Path, stored: Stored) -> torch.Tensor:
        """A whole tensor of the file, on the CPU and with memory of its own. Errors are those of
        ``read_into``."""
        made = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(path, stored.offset, made)
        return made

    def read_into(self, path: Path, offset: int, target: torch.Tensor) -> None:
        """Fill a tensor with what a file has from a byte on.

        Args:
            path: the file.
            offset: the first byte.
            target: contiguous, on the CPU.

        Raises:
            DamagedCheckpoint: the file is gone.
            TryAgain: the disk does not give it.
            UserError: it must not be read.
        """
        if target.numel():
            memory = target.view(-1).view(torch.uint8).numpy().data
            undamaged(functools.partial(self._fill, path, offset, memory), path)

    def _fill(self, path: Path, offset: int, memory: memoryview) -> None:
        file = self._open.pop(path, None) or open_regular(path)
        try:
            _read_exactly(file, offset, memory)
        except BaseException:
            file.close()  # a handle that went stale stays so: the next attempt opens the file anew
            raise
        self._open[path] = file
        while len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()


def _read_exactly(file: BinaryIO, offset: int, memory: memoryview) -> None:
    """All of it: the system may give less at a time."""
    done = 0
    while done < len(memory):
        read = os.preadv(file.fileno(), [memory[done:]], offset + done)
        if not read:
            raise OSError(errno.EIO, f"the file ends at byte {offset + done}")
        done += read


def _header(path: Path) -> dict[str, Stored]:
    """One attempt at reading it.

    Raises:
        UnusableFile: it is not one.
        OSError: the disk did not give it.
    """

    def refused(why: str) -> UnusableFile:
        return UnusableFile(f"{path}: not a safetensors file: {why}")

    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise refused(f"it has {size} bytes")
        prefix = bytearray(8)
        _read_exactly(file, 0, memoryview(prefix))
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise refused(f"its header would have {length:,} bytes")
        text = bytearray(length)
        _read_exactly(file, 8, memoryview(text))
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        raise refused("its header is not JSON") from None
    if not isinstance(described, dict):
        raise refused("its header is not a JSON object")
    found: dict[str, Stored] = {}
    ends: list[tuple[int, int]] = []
    for key, value in described.items():
        if key == "__metadata__":
            continue
        stored = _stored(value, size - 8 - length)
        if stored is None:
            raise refused(f"{reprlib.repr(key)} is {reprlib.repr(value)}")
        begin, end = value["data_offsets"]
        ends.append((begin, end))
        found[key] = Stored(stored.dtype, stored.shape, 8 + length + begin)
    reached = 0
    for begin, end in sorted(ends):
        if begin != reached:
            raise refused(f"its tensors overlap or leave a gap at byte {reached} of the data")
        reached = end
    if reached != size - 8 - length:
        raise refused(f"its tensors have {reached} bytes, and the file {size - 8 - length} behind its header")
    return found


def _stored(value: Any, data_bytes: int) -> Stored | None:
    """What a header says of a tensor, with its offset in the data; None where it cannot be."""

    if type(value) is not dict or type(value.get("dtype")) is not str or value["dtype"] not in _DTYPES:
        return None
    shape, offsets = _whole_numbers(value.get("shape")), _whole_numbers(value.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        return None
    dtype, (begin, end) = _DTYPES[value["dtype"]], offsets
    if not begin <= end <= data_bytes or end - begin != math.prod(shape) * dtype.itemsize:
        return None
    return Stored(dtype, tuple(shape), begin)


def _whole_numbers(value: Any) -> list[int] | None:
    """A short list of lengths; None where it is something else."""
    fits = (
        type(value) is list and len(value) <= 8 and all(type(n) is int and 0 <= n <= 1 << 50 for n in value)
    )
    return value if fits else None
