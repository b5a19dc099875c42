"""Reading a saved state into any layout: which elements of which saved shard a range of a shard is.

A shard is a range of entries of one dimension, with all of the others. Saved and wanted shards may be cut
along two different dimensions, never more. So dimensions that lie between the cuts are taken together, and
what is left is a row of matrices (P, R, C): one cut runs through the rows and the other through the columns
of all of them. A range of a shard's flattened elements covers whole rows but for its ends; those rows are
read from the saved shards that meet them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lpa.checkpoint.manifest import DamagedCheckpoint
from megatron_lpa.checkpoint.tensor_file import shard_name
from megatron_lpa.checkpoint.tensor_reader import TensorFiles
from megatron_lpa.run_folder import MANIFEST

BLOCK_ELEMENTS = 1 << 18
"""Read at a time where only some columns are wanted: 1 MiB, which stays in the processor's caches."""


@dataclass(frozen=True)
class Box:
    """What one tensor-parallel rank holds of a tensor with any number of dimensions.

    Args:
        shape: of the whole tensor.
        dim: dimension that is cut; None where the rank holds everything.
        first: first entry of that dimension.
        end: the entry after its last.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    first: int = 0
    end: int = 0

    def within(self, cuts: tuple[int, int]) -> _Within:
        """Its place among the matrices (P, R, C) that the tensor is when cut before two dimensions."""
        outer, inner = cuts
        rows, columns = (0, math.prod(self.shape[outer:inner])), (0, math.prod(self.shape[inner:]))
        if self.dim is not None:
            each = math.prod(self.shape[self.dim + 1 : inner if self.dim < inner else None])
            cut = self.first * each, self.end * each
            rows, columns = (cut, columns) if self.dim < inner else (rows, cut)
        return _Within(math.prod(self.shape[:outer]), *rows, *columns)


@dataclass(frozen=True)
class _Within:
    """Rows ``first_row`` to ``end_row`` and columns ``first_column`` to ``end_column`` of each of P
    matrices."""

    matrices: int
    first_row: int
    end_row: int
    first_column: int
    end_column: int

    @property
    def rows(self) -> int:
        """Of each matrix."""
        return self.end_row - self.first_row

    @property
    def columns(self) -> int:
        """Width."""
        return self.end_column - self.first_column


def shard_box(shape: Sequence[int], tp_dim: int | None, tp_rank: int, tp_size: int) -> Box:
    """The box of one tensor-parallel rank."""
    assert tp_dim is None or 0 <= tp_dim < len(shape), (shape, tp_dim)
    if tp_dim is None or tp_size == 1:
        return Box(tuple(shape))
    size = shape[tp_dim] // tp_size
    return Box(tuple(shape), tp_dim, tp_rank * size, (tp_rank + 1) * size)


def _cuts(dimensions: int, *boxes: Box) -> tuple[int, int]:
    """Before which two dimensions a tensor is to be cut, so that every box is one of rows or of columns."""
    cut = sorted({box.dim for box in boxes if box.dim is not None})
    if len(cut) == 2:
        return cut[0], cut[1]
    return 0, max([min(1, dimensions), *cut])


@dataclass(frozen=True)
class _Piece:
    """A fragment in a file: elements ``first`` to ``end`` of a shard, from byte ``offset`` on."""

    first: int
    end: int
    path: Path
    offset: int


class StateReader:
    """The fragments of a checkpoint's ``state/``, read where they are needed; ``open`` makes it.

    Args:
        checkpoint: the folder.
        manifest: its manifest.
    """

    def __init__(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._parameters: dict[str, dict[str, Any]] = manifest["state"]["parameters"]
        self._tp_size: int = manifest["layout"]["tensor_parallel_size"]
        self._files = TensorFiles()
        self._pieces: dict[tuple[str, str, str], list[_Piece]] = {}

    @classmethod
    def open(cls, checkpoint: Path, manifest: dict[str, Any]) -> StateReader:
        """Look into the files, which have been compared with their hashes.

        Raises:
            DamagedCheckpoint: a file of something else.
            TryAgain: the disk does not give one.
        """
        reader = cls(checkpoint, manifest)
        for name in sorted(manifest["files"]):
            if name.startswith("state/"):
                reader._index(checkpoint / name)
        for pieces in reader._pieces.values():
            pieces.sort(key=lambda piece: piece.first)
        return reader

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
            length: elements, at least one.

        Returns:
            (length,) fp32 on the CPU. Rows that the saved parameter does not have (vocabulary padding) are
            zero, as they have been since they were made.

        Raises:
            DamagedCheckpoint: no file holds it.
            TryAgain: the disk does not give it.
        """
        shape, tp_dim = self.shape_of(name), self._parameters[name]["tp_dim"]
        shards = 1 if tp_dim is None else self._tp_size
        sources = [shard_box(shape, tp_dim, tp_rank, shards) for tp_rank in range(shards)]
        cuts = _cuts(len(shape), box, *sources)
        target = box.within(cuts)
        first, end = start // target.columns, -(-(start + length) // target.columns)
        rows = torch.zeros(end - first, target.columns)
        for tp_rank, source_box in enumerate(sources):
            source = source_box.within(cuts)
            place = (name, kind, shard_name(tp_dim, tp_rank, shards))
            for matrix in range(first // target.rows, min(-(-end // target.rows), source.matrices)):
                before = matrix * target.rows  # rows of the target up to this matrix
                top = max(first - before + target.first_row, target.first_row, source.first_row)
                bottom = min(end - before + target.first_row, target.end_row, source.end_row)
                if top < bottom:
                    found = before + top - target.first_row - first
                    wanted = rows[found : found + bottom - top]
                    self._read_rows(place, source, target, (matrix, top), wanted)
        return rows.view(-1).narrow(0, start - first * target.columns, length)

    def _read_rows(
        self,
        place: tuple[str, str, str],
        source: _Within,
        target: _Within,
        first: tuple[int, int],
        wanted: torch.Tensor,
    ) -> None:
        """Rows of one matrix, as many as ``wanted`` has, from a saved shard: the columns that both have.

        Args:
            place: the saved shard.
            source: where it lies.
            target: where the columns of ``wanted`` lie.
            first: the matrix, and the row in it.
            wanted: (rows, columns of the target), changed in place.
        """
        left, right = (
            max(target.first_column, source.first_column),
            min(target.end_column, source.end_column),
        )
        if left >= right:
            return
        matrix, row = first
        begin = (matrix * source.rows + row - source.first_row) * source.columns
        if source.columns == target.columns == right - left:
            self._fill(place, begin, wanted.view(-1))
            return
        wanted = wanted[:, left - target.first_column : right - target.first_column]
        at_once = max(1, BLOCK_ELEMENTS // source.columns)
        block = torch.empty(min(at_once, len(wanted)), source.columns)
        for done in range(0, len(wanted), at_once):
            found = block[: len(wanted) - done]
            self._fill(place, begin + done * source.columns, found.view(-1))
            wanted[done : done + len(found)] = found[
                :, left - source.first_column : right - source.first_column
            ]

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
                f"{self._checkpoint / 'state'}: element {reached} of {name} ({kind}, shard {shard}) is in no "
                "file"
            )
