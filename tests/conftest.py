"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

# What DeepSpeed compiles is this checkout's own: others may hold its lock, or have other libraries.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(TESTS.parent / ".torch_extensions"))
# Several workers have no more than a core each. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.world import World  # noqa: E402

from megatron_lpa.command_line import log_to_stderr  # noqa: E402

SECONDS = TESTS / "seconds.json"  # of the longest files; support/seconds.py writes it
SLOW_FOLDERS = {"integration", "slurm"}
SLOW_FIXTURES: set[str] = set()

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is slow, and for several workers put the longest files first, so that none is left alone at the end."""
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames) or item.path.relative_to(TESTS).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        seconds = json.loads(SECONDS.read_text())
        items.sort(key=lambda item: -seconds.get(together(item.nodeid), 0))  # stable: files stay whole


def together(nodeid: str) -> str:
    """Whose tests one worker runs: a file's, whose fixtures they share; and SLURM's, which share a cluster."""
    file = nodeid.partition("::")[0]
    return "tests/slurm" if file.startswith("tests/slurm/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By file, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

    config.option.loadscopereorder = False
    return ByFile(config, log)
