"""Fixtures shared by all tests."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from support.world import World

from megatron_lpa.command_line import log_to_stderr

log_to_stderr()  # as in a command

# A shell without job control starts what goes to the background with SIGINT ignored, which processes inherit: those that
# tests interrupt would not notice.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """``world(n)``: n processes joined over gloo, started at first use and kept for the session."""
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        if size not in worlds or worlds[size].closed:
            worlds[size] = World(size)
        return worlds[size]

    yield of_size
    for started in worlds.values():
        started.close()
