"""Where a process stands in its launch, as launchers tell it through the environment."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from megatron_lpa.errors import UserError

_NUMBER = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class Place:
    """Where a process stands in its launch, as ``deepspeed``, ``torchrun`` or ``srun`` tell it.

    Args:
        rank: from 0.
        world_size: processes in all.
        local_rank: from 0, on this machine.
        local_size: processes on this machine; all, where nothing says so.
        host: this machine's name.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


def place_from_environment() -> Place:
    """From ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, and ``LOCAL_WORLD_SIZE`` or ``LOCAL_SIZE``.

    Raises:
        UserError: one of them is empty or no number, or they do not fit together.
    """

    def number(default: int, *names: str) -> int:
        for name in names:
            text = os.environ.get(name)
            if text is None:
                continue
            if not text.strip():
                # DeepSpeed and PyTorch read it too, and take it for a number.
                raise UserError(
                    f"{name} is empty, but must be a whole number; unset it, or start through a launcher"
                )
            if not _NUMBER.fullmatch(text):
                raise UserError(f"{name} is {text[:40]!r}, but must be a whole number")
            return int(text)
        return default

    world_size = number(1, "WORLD_SIZE")
    place = Place(
        number(0, "RANK"),
        world_size,
        number(0, "LOCAL_RANK"),
        number(world_size, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        socket.gethostname(),
    )
    if not 0 <= place.rank < world_size or not 0 <= place.local_rank < place.local_size:
        raise UserError(
            f"RANK={place.rank}, WORLD_SIZE={world_size}, LOCAL_RANK={place.local_rank} and "
            f"LOCAL_WORLD_SIZE={place.local_size} do not fit together; start through a launcher"
        )
    return place
