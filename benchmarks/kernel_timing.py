"""Times on a device and on the host, and the two ceilings that every time is compared with.

A call costs the device some time, and the host some time to launch. In a large model the host is far ahead,
and a step takes what the device takes; in a small one a step takes what the host takes. So both are measured,
apart: device times between events, with the host ahead, and host times with the device asleep.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.machine import describe_machine, versions_of
from megatron_lpa.ops.products import keep_partial_sums_in_fp32

ROTATED_BYTES = 256 * 2**20
"""Inputs rotate among copies that together are several times the L2 cache, so that none is read from it."""

MAX_SETS = 16

BATCH = 8
"""Calls that are queued at once. A call is up to about 70 launches, and a queue holds about 1,000 of them: in
a full one the host waits for the device."""

CYCLES_PER_SECOND = 2e9
"""No less than a GPU's clock: a sleep of so many cycles takes a second or more."""

MAX_BATCHES = 25
TRIES = 4
LONGEST_SLEEP_S = 0.25


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure.

    Args:
        device: of all tensors.
        dtype: of all tensors.
        budget_ms: time spent on one figure after warming up.
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


@dataclass(frozen=True)
class Times:
    """Medians of one call. On a CPU both are the time of the call.

    Args:
        device_us: what the device takes.
        host_us: what the host takes to launch it.
        host_ahead: whether the host was ahead of the device. If not, as where a call waits for the device,
            ``device_us`` holds the device's waiting, too.
    """

    device_us: float
    host_us: float
    host_ahead: bool = True

    def record(self) -> dict[str, Any]:
        """As it stands in a result."""
        rounded = {"device_us": round(self.device_us, 2), "host_us": round(self.host_us, 2)}
        return rounded if self.host_ahead else {**rounded, "host_ahead": False}


Measure = Callable[[float], Times]
"""Milliseconds to spend -> medians. Made once per call to be timed; warmed up already."""


def rotation(bytes_of_one: int, dry: bool, most: int = MAX_SETS) -> int:
    """How many sets of inputs to rotate among."""
    return 1 if dry else max(2, min(most, -(-ROTATED_BYTES // max(1, bytes_of_one))))


def queued(call: Callable[[int], Any], sets: int, setting: Setting) -> Measure:
    """Times ``call(set)`` over rotating sets, launched one by one."""
    for index in range(sets):
        call(index)
    if setting.device.type == "cuda":
        return _Queue(call, sets).measure

    def measure(_: float) -> Times:
        times = []
        for index in range(sets if setting.dry else 5 * sets):
            start = time.perf_counter()
            call(index % sets)
            times.append(1e6 * (time.perf_counter() - start))
        return Times(statistics.median(times), statistics.median(times))

    return measure


def captured(call: Callable[[int], Any], sets: int, setting: Setting) -> Measure:
    """Like ``queued`` with the calls of all sets in one CUDA graph, which is captured once: the device time
    of one call as in a captured decoding loop. The host's time is that of launching it without a graph."""
    if setting.device.type != "cuda":
        return queued(call, sets, setting)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(sets):
            call(index)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(sets):
            call(index)
        host_us = 1e6 * (time.perf_counter() - start) / sets
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(sets):
            call(index)
    queue = _Queue(lambda _: graph.replay(), 1)

    def measure(budget_ms: float) -> Times:
        times = queue.measure(budget_ms)
        return Times(times.device_us / sets, host_us, times.host_ahead)

    return measure


class _Queue:
    """Calls queued behind a sleep of the device that lasts until the host has queued them all."""

    def __init__(self, call: Callable[[int], Any], sets: int) -> None:
        self.call, self.sets = call, sets
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(0)
        self.sleep_s = min(LONGEST_SLEEP_S, 2 * BATCH * (time.perf_counter() - start))

    def measure(self, budget_ms: float) -> Times:
        """Batches until the time is spent; those that the host was not ahead of count only if there are no
        others."""
        batches: list[tuple[list[float], float]] = []
        late: list[tuple[list[float], float]] = []
        end = time.perf_counter() + budget_ms / 1e3
        while not batches or (time.perf_counter() < end and len(batches) < MAX_BATCHES):
            device_us, host_us, ahead = self.batch()
            (batches if ahead else late).append((device_us, host_us))
            if not ahead:
                self.sleep_s = min(LONGEST_SLEEP_S, 2 * self.sleep_s)
            if len(late) >= TRIES:
                break
        counted = batches or late
        return Times(
            statistics.median(time_us for device_us, _ in counted for time_us in device_us),
            statistics.median(host_us for _, host_us in counted),
            host_ahead=bool(batches),
        )

    def batch(self) -> tuple[list[float], float, bool]:
        """Device times and the mean host time of ``BATCH`` calls, and whether all were queued before the
        first began."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(BATCH)]
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self.sleep_s * CYCLES_PER_SECOND))
        begin = time.perf_counter()
        for number, (start, end) in enumerate(events):
            start.record()
            self.call(number % self.sets)
            end.record()
        host_us = 1e6 * (time.perf_counter() - begin) / BATCH
        ahead = not events[0][0].query()
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events], host_us, ahead


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
    """A matrix product of 8192 cubed and a copy of 2 GiB, on random numbers: zeros run faster than real
    data."""
    size, count = (64, 2**16) if setting.dry else (8192, 2**30)
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    budget_ms = 4 * setting.budget_ms  # everything is compared with these two
    product_us = queued(lambda _: a @ b, 1, setting)(budget_ms).device_us
    source = torch.randn(count, device=setting.device, dtype=setting.dtype)
    target = torch.empty_like(source)
    copy_us = queued(lambda _: target.copy_(source), 1, setting)(budget_ms).device_us
    return Ceilings(2e6 * size**3 / product_us, 2e6 * source.nbytes / copy_us)


def device_name(setting: Setting) -> str:
    """As tuning tables name a device: cards of one compute capability differ in bandwidth."""
    return torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu"


def setting_of(dry: bool, budget_ms: float, dtype: str = "bfloat16") -> Setting:
    """The GPU where there is one; a dry run computes in fp32, on the CPU where there is none. Products sum as
    in training."""
    keep_partial_sums_in_fp32()
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
