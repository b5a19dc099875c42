"""Fixtures shared by all tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from support.world import World


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
