"""What a result has to say about where it comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_lpa.data.storage.partial_file import write_json

BUSY_LOAD = 0.5


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """CPU model, cores, memory, operating system, Python, and how busy the machine is now."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def warn_if_busy(machine: dict[str, Any]) -> None:
    """Times taken on a busy machine say little, and nothing in them shows it."""
    load = machine["load_average_1min"]
    if load > BUSY_LOAD:
        print(
            f"warning: the load average is {load}; times are only good on an idle machine (below "
            f"{BUSY_LOAD})",
            file=sys.stderr,
        )


def versions_of(packages: Sequence[str]) -> dict[str, str | None]:
    """The installed version of each package, ``None`` where it is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result as JSON where a path is given: whole or not at all, whatever ends the process.

    Raises:
        UserError: it cannot be written.
    """
    if path is not None:
        write_json(path, result)
