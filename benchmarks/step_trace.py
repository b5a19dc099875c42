"""Profiles some steps of a loop, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from benchmarks import trace
from benchmarks.kernel_timing import describe, setting_of
from benchmarks.machine import versions_of
from benchmarks.step_config import Contender
from benchmarks.step_loops import annotated_deepspeed, build_loop
from benchmarks.step_plans import recorded_plans
from benchmarks.step_timing import device_here, synchronize, timed_steps
from megatron_lpa.data.storage.partial_file import explained_write_errors


def profiled(contender: Contender, warm_up: int, steps: int, path: Path) -> dict[str, Any]:
    """Profiles some steps in this process, writes the trace, and reads the table off it.

    Args:
        contender: what to profile.
        warm_up: steps before.
        steps: steps in the trace.
        path: of the trace.
    """
    device = device_here()
    loop = build_loop(contender, device)
    with recorded_plans() as plans:
        for _ in range(1 if contender.dry else warm_up):
            loop.step()
    unprofiled = timed_steps(loop, steps, device)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def export(profiler: profile) -> None:
        with explained_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))

    # The profiler's first step pays for its own start; it is left out of the trace.
    plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with (
        annotated_deepspeed() if contender.loop == "engine" else contextlib.nullcontext(),
        profile(activities=activities, schedule=plan, on_trace_ready=export) as profiler,
    ):
        for number in range(1 + steps):
            with record_function(trace.STEP):
                loop.step()
            if number in (0, steps):
                synchronize(device)
            profiler.step()
    figures = trace.summary(trace.read_events(path))
    return {
        "benchmark": "profile",
        **describe(setting_of(contender.dry, 0.0)),
        "versions": versions_of(("torch", "triton", "deepspeed", "transformers")),
        "contender": dataclasses.asdict(contender),
        "kernels": dataclasses.asdict(loop.config.kernels),
        "plans": plans,
        "attention_backend": figures.pop("attention_backend"),
        "dtype": contender.precision,
        "step_ms_without_profiler": sorted(unprofiled)[len(unprofiled) // 2],
        "profile": figures,
        "trace": path.name,
    }
