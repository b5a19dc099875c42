"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # for support, fault_injection and benchmarks

# What DeepSpeed compiles is this checkout's own: others may hold its lock, or have other libraries.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(TESTS.parent / ".torch_extensions"))
# Several workers have no more than a core each. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.seconds import SECONDS  # noqa: E402
from support.world import World  # noqa: E402

from megatron_lpa.command_line import log_to_stderr  # noqa: E402

SLOW_FOLDERS = {"integration", "slurm"}

log_to_stderr()  # as in a command

# A shell without job control starts what goes to the background with SIGINT ignored, which processes inherit:
# those that tests interrupt would not notice.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def world() -> Iterator[Callable[[int], World]]:
    """``world(n)``: n processes joined over gloo, started at first use and kept for a file of tests.

    Not for longer: DeepSpeed and PyTorch keep settings of a process, and with them the last bits of a case
    would depend on the files before.
    """
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        if size not in worlds or worlds[size].closed:
            worlds[size] = World(size)
        return worlds[size]

    yield of_size
    for started in worlds.values():
        started.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is slow, and for several workers put the longest files first, so that none is left alone at
    the end."""
    seconds: dict[str, int] = json.loads(SECONDS.read_text())
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in SLOW_FOLDERS or item.nodeid.partition("[")[0] in seconds:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        of_group: dict[str, int] = defaultdict(int)
        for file in {item.nodeid.partition("::")[0] for item in items}:
            of_group[together(file)] += seconds.get(file, 0)
        items.sort(key=lambda item: -of_group[together(item.nodeid)])  # stable: files stay whole


def together(nodeid: str) -> str:
    """Whose tests one worker runs: a file's, whose fixtures they share; and SLURM's, which share a
    cluster."""
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
