"""How the files of a ``weights`` folder are called and listed; needs neither DeepSpeed nor a process group."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_lpa.engine.manifest import WrittenFile

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
