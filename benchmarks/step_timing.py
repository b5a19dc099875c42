"""Times steps, and says what is recorded where a model fails."""

from __future__ import annotations

import gc
import itertools
import time
from typing import Any

import torch

from benchmarks.step_loops import Loop

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` is the time that this process's threads computed: on a shared machine, without what the others
took."""

TURN_STEPS = 3
"""Steps in a row of one model before the next one's turn, in one process."""


def device_here() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_steps(loop: Loop, count: int, device: torch.device, clock: str = "wall") -> list[float]:
    """Milliseconds from the end of one step to the end of the next, on a CPU by one of ``CLOCKS``.

    On a GPU between events, without waiting between steps: what the host does while the device still works
    costs nothing, and where the device has to wait for the host, the wait counts. That is how training runs.
    """
    synchronize(device)
    if device.type != "cuda":
        times = []
        for _ in range(count):
            start = CLOCKS[clock]()
            loop.step()
            times.append(1e3 * (CLOCKS[clock]() - start))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        loop.step()
        event.record()
    synchronize(device)
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def failure(error: BaseException) -> dict[str, Any]:
    """What is recorded in place of figures."""
    if isinstance(error, ModuleNotFoundError):
        return {"missing_package": error.name, "error": f"not measured: the package {error.name} is missing"}
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return {"out_of_memory": True, "error": f"out of memory: {error}"[:500]}
    return {"error": f"{type(error).__name__}: {error}"[:2000]}


def release() -> None:
    """Gives back what a failed or finished model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
