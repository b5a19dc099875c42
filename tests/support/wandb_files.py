"""What is in the ``.wandb`` files that W&B uploads, read without W&B's own reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES, _HEADER_BYTES, _FILE_HEADER_BYTES = 32768, 7, 7
_WHOLE, _LAST = 1, 4


def _records(path: Path) -> Iterator[Any]:
    """LevelDB's log format: blocks of pieces, each with a checksum, a length and which piece it is."""
    from wandb.proto import wandb_internal_pb2

    data, place, pieces = path.read_bytes(), _FILE_HEADER_BYTES, b""
    while place + _HEADER_BYTES <= len(data):
        left = _BLOCK_BYTES - place % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER_BYTES])
        pieces += data[place + _HEADER_BYTES : place + _HEADER_BYTES + length]
        place += _HEADER_BYTES + length
        if kind in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


def history_of(folder: Path, tag: str) -> list[tuple[int, float]]:
    """``(step, value)`` of one tag, in the order of the only ``.wandb`` file of a W&B run's folder."""
    (path,) = folder.glob("*.wandb")
    found = []
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            values = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            if tag in values:
                found.append((values["_step"], values[tag]))
    return found


def tags_of(folder: Path) -> set[str]:
    """Of the W&B run."""
    (path,) = folder.glob("*.wandb")
    return {
        tag
        for record in _records(path)
        if record.WhichOneof("record_type") == "run"
        for tag in record.run.tags
    }
