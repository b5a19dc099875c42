"""How the files of a ``weights`` folder are called and listed; needs neither DeepSpeed nor a process group."""

from __future__ import annotations

import functools
import json
import re
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_lpa.checkpoint.manifest import DamagedCheckpoint, WrittenFile, size_of, undamaged
from megatron_lpa.errors import UserError
from megatron_lpa.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


def weights_name(number: int, count: int) -> str:
    """The name of one of ``count`` files; numbers begin at 1."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def index_text(files: Sequence[WrittenFile], names_in: Sequence[Sequence[str]]) -> str:
    """The index of several files, in the format of Hugging Face's sharded checkpoints.

    Args:
        files: named inside the folder.
        names_in: the parameters that each of them holds.
    """
    weight_map = {name: file.name for file, names in zip(files, names_in, strict=True) for name in names}
    total = sum(file.bytes for file in files)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def weights_in(folder: Path, listed: Collection[str] | None = None) -> list[Path]:
    """The files of a ``weights`` folder that hold parameters.

    Args:
        folder: the folder.
        listed: names inside it that may be read, as their contents have been compared with hashes; None allows all.

    Raises:
        DamagedCheckpoint: an index of something else, or one that names what is no regular file of the folder.
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
                f"{index}: damaged: it names {reprlib.repr(name)}, which is no file of this checkpoint's weights"
            )
    return [folder / name for name in sorted(set(names))]
