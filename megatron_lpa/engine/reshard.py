"""Reading a saved state into any layout: which elements of which saved shard a range of a shard is.

A shard of a matrix is a box of rows and columns of the unsharded one. A range of its flattened elements
covers whole rows but for its ends; those rows are read from the saved shards whose boxes meet them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lpa.engine.manifest import MANIFEST, DamagedCheckpoint
from megatron_lpa.engine.tensor_reader import TensorFiles

WHOLE = "whole"
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What a state holds of each parameter: the fp32 value, and AdamW's moments."""

BLOCK_ELEMENTS = 1 << 18
"""Read at a time where only some columns are wanted: 1 MiB, which stays in the processor's caches."""


@dataclass(frozen=True)
class Box:
    """Rows ``first_row`` to ``end_row`` and columns ``first_column`` to ``end_column`` of a matrix."""

    first_row: int
    end_row: int
    first_column: int
    end_column: int

    @property
    def columns(self) -> int:
        """Width."""
        return self.end_column - self.first_column


def shard_box(shape: Sequence[int], tp_dim: int | None, tp_rank: int, tp_size: int) -> Box:
    """The box of one tensor-parallel rank; a vector is a matrix of one column."""
    assert len(shape) in (1, 2) and tp_dim in (None, *range(len(shape))), (shape, tp_dim)
    rows, columns = shape[0], math.prod(shape[1:])
    if tp_dim is None:
        return Box(0, rows, 0, columns)
    size = shape[tp_dim] // tp_size
    first, end = tp_rank * size, (tp_rank + 1) * size
    return Box(first, end, 0, columns) if tp_dim == 0 else Box(0, rows, first, end)


def shard_name(tp_dim: int | None, tp_rank: int, tp_size: int) -> str:
    """How files call a shard: its tensor-parallel rank, or ``whole``."""
    return WHOLE if tp_dim is None or tp_size == 1 else str(tp_rank)


def fragment_key(name: str, kind: str, shard: str, start: int) -> str:
    """The key of a fragment in a file."""
    return f"{name}/{kind}/{shard}/{start}"


@dataclass(frozen=True)
class _Piece:
    """A fragment in a file: elements ``first`` to ``end`` of a shard, from byte ``offset`` on."""

    first: int
    end: int
    path: Path
    offset: int


class StateReader:
    """The fragments of a checkpoint's ``state/``, read where they are needed.

    Args:
        checkpoint: the folder.
        manifest: its manifest, whose files have been compared with their hashes.

    Raises:
        DamagedCheckpoint: a file of something else.
        TryAgain: the disk does not give one.
    """

    def __init__(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._parameters: dict[str, dict[str, Any]] = manifest["state"]["parameters"]
        self._tp_size: int = manifest["layout"]["tensor_parallel_size"]
        self._files = TensorFiles()
        self._pieces: dict[tuple[str, str, str], list[_Piece]] = {}
        for name in sorted(manifest["files"]):
            if name.startswith("state/"):
                self._index(checkpoint / name)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.first)

    def _index(self, path: Path) -> None:
        for key, stored in self._files.header(path).items():
            name, *place = key.rsplit("/", 3)
            flat = len(stored.shape) == 1 and stored.dtype == torch.float32
            if not flat or len(place) != 3 or not re.fullmatch("[0-9]{1,15}", place[2]):
                raise DamagedCheckpoint(f"{path}: not a file of fragments: it has {key[:100]!r}")
            kind, shard, first = place[0], place[1], int(place[2])
            piece = _Piece(first, first + stored.shape[0], path, stored.offset)
            self._pieces.setdefault((name, kind, shard), []).append(piece)

    def read(self, name: str, kind: str, box: Box, start: int, length: int) -> torch.Tensor:
        """A range of a shard, whatever the layout it was saved from.

        Args:
            name: the parameter.
            kind: ``master``, ``exp_avg`` or ``exp_avg_sq``.
            box: the shard.
            start: first element in the flattened shard.
            length: elements.

        Returns:
            (length,) fp32 on the CPU. Rows that the saved parameter does not have (vocabulary padding) are
            zero, as they have been since they were made.

        Raises:
            DamagedCheckpoint: no file holds it.
            TryAgain: the disk does not give it.
        """
        shape, tp_dim = self.shape_of(name), self._parameters[name]["tp_dim"]
        first_row = box.first_row + start // box.columns
        end_row = box.first_row - (-(start + length) // box.columns)
        rows = torch.zeros(end_row - first_row, box.columns)
        for tp_rank in range(1 if tp_dim is None else self._tp_size):
            source = shard_box(shape, tp_dim, tp_rank, self._tp_size)
            top, bottom = max(first_row, source.first_row), min(end_row, source.end_row)
            left, right = (
                max(box.first_column, source.first_column),
                min(box.end_column, source.end_column),
            )
            if top >= bottom or left >= right:
                continue
            place = (name, kind, shard_name(tp_dim, tp_rank, self._tp_size))
            first = (top - source.first_row) * source.columns
            wanted = rows[top - first_row : bottom - first_row]
            if source.columns == box.columns == right - left:
                self._fill(place, first, wanted.view(-1))
                continue
            wanted = wanted[:, left - box.first_column : right - box.first_column]
            at_once = max(1, BLOCK_ELEMENTS // source.columns)
            block = torch.empty(min(at_once, bottom - top), source.columns)
            for row in range(0, bottom - top, at_once):
                found = block[: bottom - top - row]
                self._fill(place, first + row * source.columns, found.view(-1))
                wanted[row : row + len(found)] = found[
                    :, left - source.first_column : right - source.first_column
                ]
        return rows.view(-1).narrow(0, start - (first_row - box.first_row) * box.columns, length)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The unsharded shape of a saved parameter.

        Raises:
            DamagedCheckpoint: there is no such parameter.
        """
        if name not in self._parameters:
            raise DamagedCheckpoint(f"{self._checkpoint / MANIFEST}: state.parameters does not have {name}")
        return tuple(self._parameters[name]["shape"])

    def _fill(self, place: tuple[str, str, str], start: int, target: torch.Tensor) -> None:
        """The elements of a saved shard from ``start`` on, from however many fragments hold them."""
        reached, end = start, start + len(target)
        for piece in self._pieces.get(place, ()):
            if piece.first <= reached < min(piece.end, end):
                stop = min(piece.end, end)
                offset = piece.offset + (reached - piece.first) * target.itemsize
                self._files.read_into(piece.path, offset, target[reached - start : stop - start])
                reached = stop
        if reached != end:
            name, kind, shard = place
            raise DamagedCheckpoint(
                f"{self._checkpoint / 'state'}: element {reached} of {name} ({kind}, shard {shard}) is in no file"
            )
