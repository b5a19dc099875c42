"""Device and host times, on a GPU that is played: a clock of the host's, and a queue of work behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import kernel_timing
from benchmarks.kernel_timing import Setting, Times, captured, queued

GPU = Setting(torch.device("cuda"), torch.bfloat16, 1.0, False)


class Device:
    """Seconds on the host's clock, and when the device will have done all that is queued."""

    def __init__(self) -> None:
        self.now = self.done = 0.0
        self.captures = 0
        self.graph: list[float] | None = None

    def launch(self, seconds: float) -> None:
        if self.graph is not None:
            self.graph.append(seconds)
            return
        self.done = max(self.now, self.done) + seconds

    def call(self, host_us: float, device_us: float) -> None:
        """Four launches."""
        for _ in range(4):
            self.now += host_us / 4e6
            self.launch(device_us / 4e6)

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)

    @contextlib.contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        self.captures += 1
        self.graph = graph.kernels
        yield
        self.graph = None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = max(device.now, device.done)

        def query(self) -> bool:
            return device.now >= self.at

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    class Graph:
        def __init__(self) -> None:
            self.kernels: list[float] = []

        def replay(self) -> None:
            device.now += 5e-6
            for seconds in self.kernels:
                device.launch(seconds)

    monkeypatch.setattr(kernel_timing, "time", SimpleNamespace(perf_counter=lambda: device.now))
    waits = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Event": Event, "CUDAGraph": Graph, "graph": device.capture, "synchronize": device.synchronize,
        "_sleep": lambda cycles: device.launch(cycles / 2e9), "Stream": lambda: waits,
        "current_stream": lambda: waits,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return device


@pytest.mark.parametrize(("host_us", "device_us"), [(400.0, 20.0), (100.0, 2000.0), (40.0, 41.0)])
def test_both_are_measured_whichever_is_slower(device: Device, host_us: float, device_us: float) -> None:
    """Events around a call that the host launches slowly would measure the gaps that it leaves."""
    times = queued(lambda _: device.call(host_us, device_us), 3, GPU)(10.0)
    assert (times.device_us, times.host_us) == (pytest.approx(device_us), pytest.approx(host_us))
    assert times.host_ahead and "host_ahead" not in times.record()


def test_a_host_that_becomes_slower_is_given_more_time(device: Device) -> None:
    calls = 0

    def call(_: int) -> None:
        nonlocal calls
        calls += 1
        device.call(10.0 if calls < 4 else 30.0, 5.0)

    times = queued(call, 2, GPU)(1.0)
    assert times == Times(pytest.approx(5.0), pytest.approx(30.0))


def test_a_call_that_waits_for_the_device_is_marked(device: Device) -> None:
    def call(_: int) -> None:
        device.call(10.0, 50.0)
        device.synchronize()

    times = queued(call, 2, GPU)(1.0)
    assert not times.host_ahead and times.record()["host_ahead"] is False


def test_sets_take_turns(device: Device) -> None:
    seen = []
    queued(lambda index: seen.append(index) or device.call(10.0, 5.0), 3, GPU)(1.0)
    assert seen[-kernel_timing.BATCH :] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_graph_is_captured_once_and_replayed(device: Device) -> None:
    measure = captured(lambda index: device.call(100.0, 8.0 + index), 4, GPU)
    for _ in range(3):
        times = measure(1.0)
        # One call's share of a replay, and the host's time without a graph.
        assert (times.device_us, times.host_us) == (pytest.approx(9.5), pytest.approx(100.0))
    assert device.captures == 1
