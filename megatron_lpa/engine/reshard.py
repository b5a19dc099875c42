"""Reading a saved state into any layout: which elements of which saved shard a range of a shard is.

A shard of a matrix is a box of rows and columns of the unsharded one. A range of its flattened elements
covers whole rows but for its ends; those rows are read from the saved shards whose boxes meet them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_lpa.engine.manifest import DamagedCheckpoint

WHOLE = "whole"
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What a state holds of each parameter: the fp32 value, and AdamW's moments."""


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


class StateReader:
    """The fragments of a checkpoint's ``state/``, mapped into memory and read where they are needed.

    Args:
        checkpoint: the folder.
        manifest: its manifest, whose files have been compared with their hashes.

    Raises:
        DamagedCheckpoint: unreadable files.
    """

    def __init__(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        self._folder = checkpoint / "state"
        self._parameters: dict[str, dict[str, Any]] = manifest["state"]["parameters"]
        self._tp_size: int = manifest["layout"]["tensor_parallel_size"]
        self._fragments: dict[tuple[str, str, str], list[tuple[int, int, Any]]] = {}
        for name in sorted(manifest["files"]):
            if name.startswith("state/"):
                self._index(checkpoint / name)
        for fragments in self._fragments.values():
            fragments.sort(key=lambda fragment: fragment[0])

    def _index(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a dict
                name, kind, shard, start = key.rsplit("/", 3)
                piece = file.get_slice(key)
                (length,) = piece.get_shape()
                self._fragments.setdefault((name, kind, shard), []).append((int(start), length, piece))
        except (SafetensorError, FileNotFoundError, ValueError) as error:
            raise DamagedCheckpoint(f"{path}: not a file of fragments: {error}") from error

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
        """
        saved = self._parameters[name]
        shape, tp_dim = saved["shape"], saved["tp_dim"]
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
            found = self._range(
                (name, kind, shard_name(tp_dim, tp_rank, self._tp_size)),
                (top - source.first_row) * source.columns,
                (bottom - source.first_row) * source.columns,
            ).view(bottom - top, source.columns)
            rows[top - first_row : bottom - first_row, left - box.first_column : right - box.first_column] = (
                found[:, left - source.first_column : right - source.first_column]
            )
        return rows.view(-1).narrow(0, start - (first_row - box.first_row) * box.columns, length)

    def _range(self, place: tuple[str, str, str], start: int, end: int) -> torch.Tensor:
        """Elements ``start`` to ``end`` of a saved shard, from however many fragments hold them."""
        pieces = []
        reached = start
        for first, length, piece in self._fragments.get(place, ()):
            if first <= reached < min(first + length, end):
                stop = min(first + length, end)
                pieces.append(piece[reached - first : stop - first])
                reached = stop
        if reached != end:
            name, kind, shard = place
            raise DamagedCheckpoint(
                f"{self._folder}: element {reached} of {name} ({kind}, shard {shard}) is in no file"
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
