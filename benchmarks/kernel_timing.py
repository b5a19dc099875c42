"""Times on a device, and the two ceilings that every time is compared with."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.machine import describe_machine, versions_of

ROTATED_BYTES = 256 * 2**20
"""Inputs rotate among copies that together are several times the L2 cache, so that none is read from it."""

MAX_SETS = 16


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure.

    Args:
        device: of all tensors.
        dtype: of all tensors.
        budget_ms: device time spent on one figure after warming up.
        dry: tiny shapes and one repetition, to try the command without a GPU.
    """

    device: torch.device
    dtype: torch.dtype
    budget_ms: float
    dry: bool

    @property
    def compile_backend(self) -> str:
        """A dry run only traces: compiling C++ would take minutes and show nothing about a GPU."""
        return "aot_eager" if self.dry else "inductor"


def rotation(bytes_of_one: int, dry: bool) -> int:
    """How many sets of inputs to rotate among."""
    return 1 if dry else max(2, min(MAX_SETS, -(-ROTATED_BYTES // max(1, bytes_of_one))))


def median_us(call: Callable[[int], Any], sets: int, setting: Setting) -> float:
    """The median time of ``call(set)`` in microseconds over rotating sets, after a warm-up.

    On a GPU the calls are queued without waiting, with an event before and after each, so the gaps that the
    host leaves between launches count only where the host is the slower one.
    """
    for index in range(sets):
        call(index)
    if setting.device.type != "cuda":
        times = []
        for index in range(sets if setting.dry else 5 * sets):
            start = time.perf_counter()
            call(index % sets)
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times)
    estimate_us = _queued_us(call, sets, 5)
    repeats = int(min(200, max(9, 1e3 * setting.budget_ms / max(1.0, statistics.median(estimate_us)))))
    return statistics.median(_queued_us(call, sets, repeats))


def _queued_us(call: Callable[[int], Any], sets: int, repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for number, (start, end) in enumerate(events):
        start.record()
        call(number % sets)
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def graph_median_us(call: Callable[[int], Any], sets: int, setting: Setting) -> float:
    """Like ``median_us`` with the calls of all sets captured in one CUDA graph: what a launch costs the host drops
    out, as it does in a captured decoding loop. Without a GPU, ``median_us``."""
    if setting.device.type != "cuda":
        return median_us(call, sets, setting)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in itertools.chain(range(sets), range(sets)):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(index) for index in range(sets)]  # its outputs must live as long as the graph
    time_us = median_us(lambda _: graph.replay(), 1, setting) / sets
    del kept
    return time_us


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches with plain operations, measured in the same run.

    Args:
        flops: of a large matrix product, per second.
        bytes: of a large copy, read and written, per second.
    """

    flops: float
    bytes: float


def measure_ceilings(setting: Setting) -> Ceilings:
    """A matrix product of 8192 cubed and a copy of 2 GiB, on random numbers: zeros run faster than real data."""
    size, count = (64, 2**16) if setting.dry else (8192, 2**30)
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    product_us = median_us(lambda _: a @ b, 1, setting)
    source = torch.randn(count, device=setting.device, dtype=setting.dtype)
    target = torch.empty_like(source)
    copy_us = median_us(lambda _: target.copy_(source), 1, setting)
    return Ceilings(2e6 * size**3 / product_us, 2e6 * source.nbytes / copy_us)


def setting_of(dry: bool, budget_ms: float, dtype: str = "bfloat16") -> Setting:
    """The GPU where there is one; a dry run computes in fp32, on the CPU where there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Setting(device, torch.float32 if dry else getattr(torch, dtype), budget_ms, dry)


def describe(setting: Setting) -> dict[str, Any]:
    """The machine, the device, the versions."""
    device: dict[str, Any] = {"type": setting.device.type}
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        device |= {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return {
        "machine": describe_machine(),
        "device": device,
        "versions": versions_of(("torch", "triton")),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "dry_run": setting.dry,
    }
