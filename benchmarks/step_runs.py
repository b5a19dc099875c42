"""Times a loop's steps: alone in a process of its own, or several loops in turns in one process.

``python -m benchmarks.step_runs SPEC.json RESULT.json`` is the process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import ROOT
from benchmarks.machine import write_result
from benchmarks.step_config import Contender
from benchmarks.step_loops import Loop, build_loop
from benchmarks.step_plans import recorded_plans
from benchmarks.step_timing import TURN_STEPS, device_here, failure, release, synchronize, timed_steps
from benchmarks.step_trace import profiled
from megatron_lpa.train.hardware import peak_memory_bytes

WORLD = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables that join processes."""


def run_alone(contender: Contender, warm_up: int, steps: int) -> dict[str, Any]:
    """Builds, warms up, measures; the process should have done nothing else, or memory is not its own."""
    device = device_here()
    try:
        loop = build_loop(contender, device)
        with recorded_plans() as plans:
            for _ in range(warm_up):
                loop.step()
        synchronize(device)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated() if on_gpu else None
        times = timed_steps(loop, steps, device)
        peak_bytes = peak_memory_bytes()
        # A step that is skipped is quick, and one after it is not the step that training takes.
        loss = float(loop.step())
        if not math.isfinite(loss) or loop.skipped_steps():
            return {"error": f"not steps of training: loss {loss}, {loop.skipped_steps()} steps skipped"}
        return {
            "rounds_ms": [times],
            "loss_after": loss,
            "parameters": loop.parameters,
            "kernels": dataclasses.asdict(loop.config.kernels),
            "plans": plans,
            "peak_memory_bytes": peak_bytes,
            "reserved_memory_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
            "memory_between_steps_bytes": resting,
        }
    except Exception as error:  # recorded; the other models' figures are worth having
        return failure(error)


def run_in_process(
    contender: Contender, warm_up: int, steps: int, limit_s: float | None, trace: Path | None = None
) -> dict[str, Any]:
    """``run_alone``, or a profile, in a process of its own.

    Args:
        contender: what to measure.
        warm_up: steps before measuring.
        steps: steps measured.
        limit_s: after this the process is ended and nothing of it counts.
        trace: profile instead (``step_trace.profiled``), and write the trace here.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec, result = Path(folder) / "spec.json", Path(folder) / "result.json"
        wanted = {"contender": dataclasses.asdict(contender), "warm_up": warm_up, "steps": steps}
        write_result(spec, wanted | {"trace": None if trace is None else str(trace.resolve())})
        command = [sys.executable, "-m", "benchmarks.step_runs", str(spec), str(result)]
        with (Path(folder) / "log").open("w+") as log:
            # An engine in this process has left its address here, and has the port.
            environment = {name: value for name, value in os.environ.items() if name not in WORLD}
            # A session of its own: compilers that it starts have to end with it.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = process.wait(limit_s)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    return {"error": f"stopped after {limit_s:.0f} s", "out_of_time": True}
                raise
            if result.exists():
                return json.loads(result.read_text())
            log.seek(0)
            return {"error": f"exit code {code}: {log.read()[-1500:]}"}


def run_together(
    contenders: Sequence[Contender],
    rounds: int,
    warm_up: int,
    steps: int,
    deadline: float | None,
    clock: str = "wall",
) -> list[dict[str, Any]]:
    """All models in this process, in turns of a few steps, so that whatever slows the machine slows all
    alike.

    Memory has to hold all of them, and no figure of memory is given.

    Args:
        contenders: what to measure.
        rounds: times that each model has its turn; each turn is ``steps`` steps in runs of ``TURN_STEPS``.
        warm_up: steps of each before measuring.
        steps: steps of each per round.
        deadline: no turn starts after this, on the clock of ``time.monotonic``.
        clock: of the times, one of ``step_timing.CLOCKS``.
    """
    device = device_here()
    loops: list[Loop | None] = []
    results: list[dict[str, Any]] = []
    for contender in contenders:
        try:
            loop = build_loop(contender, device)
            with recorded_plans() as plans:
                for _ in range(warm_up):
                    loop.step()
            loops.append(loop)
            results.append(
                {
                    "rounds_ms": [],
                    "parameters": loop.parameters,
                    "kernels": dataclasses.asdict(loop.config.kernels),
                    "plans": plans,
                    "peak_memory_bytes": None,
                }
            )
        except Exception as error:  # recorded; the other models' figures are worth having
            loops.append(None)
            results.append(failure(error))
            release()
    for _ in range(rounds):
        turns: list[list[float]] = [[] for _ in loops]
        for start in range(0, steps, TURN_STEPS):
            for loop, times in zip(loops, turns, strict=True):
                if loop is not None:
                    times += timed_steps(loop, min(TURN_STEPS, steps - start), device, clock)
        for result, times in zip(results, turns, strict=True):
            if times:
                result["rounds_ms"].append(times)
        if deadline is not None and time.monotonic() > deadline:
            break
    return results


def profile_alone(contender: Contender, warm_up: int, steps: int, trace: Path) -> dict[str, Any]:
    """The profile, or what it failed by."""
    try:
        return profiled(contender, warm_up, steps, trace)
    except Exception as error:  # recorded, as in run_alone
        return failure(error)


def main(spec_file: str, result_file: str) -> None:
    """The process of its own."""
    spec = json.loads(Path(spec_file).read_text())
    fields = spec["contender"]
    contender = Contender(**fields | {"settings": tuple(fields["settings"])})
    if spec["trace"] is None:
        result = run_alone(contender, spec["warm_up"], spec["steps"])
    else:
        result = profile_alone(contender, spec["warm_up"], spec["steps"], Path(spec["trace"]))
    write_result(Path(result_file), result)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
