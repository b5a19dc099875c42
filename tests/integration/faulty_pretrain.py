"""The entry point with faults in chosen global batches: ``FAULTS={"3": "nan", "7": "spike"}``.

``nan``: what the last rank's final norm gives is not a number. ``spike``: what all ranks' gives is far off.
``hang``: the last rank reads its data for ever. ``die``: all ranks are gone before they read theirs.
``unreadable``: the last rank cannot read its data. ``stop``: the last rank is sent SIGTERM before the step.
As ``{"start": "hang"}``: the last rank opens its data for ever; ``{"start": "die"}``: it is gone then.
``{"write": "hang"}``: it writes its first checkpoint for ever; ``{"write": "moved"}``: once it has written
its part, the run folder gets another name. ``moved``, ``taken``: so it is before the step, or another run has
locked it, and what all ranks' final norm gives is not a number. ``moved, hang``: the last rank then hangs.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_lpa.checkpoint import saving
from megatron_lpa.engine.stepping import Engine, StepResult
from megatron_lpa.pretrain import leave, main
from megatron_lpa.train import loop, start
from megatron_lpa.train.state import Run

FAULTS = json.loads(os.environ["FAULTS"])
FACTOR = {"nan": float("nan"), "spike": -50.0, "moved": float("nan"), "taken": float("nan")}
original = Engine.train_step
held = []


def run_folder(config: Any) -> Path:
    return Path(config.logging.run_dir) / config.logging.name


def move(folder: Path) -> None:
    os.rename(folder, f"{folder}.moved")


def take(folder: Path) -> None:
    """Lock the run folder as another run would that found no lock there, and begin to train in it."""
    held.append(os.open(folder / "other", os.O_CREAT | os.O_RDWR))
    fcntl.flock(held[-1], fcntl.LOCK_EX)
    shutil.copytree(folder / "checkpoints/step_00000006", folder / "checkpoints/step_00000002")
    os.replace(folder / "other", folder / ".lock")


def train_step(engine: Engine, batches: Any, first_samples: Any, lr: float) -> StepResult:
    kind = FAULTS.get(str(first_samples[0] // engine.config.train.global_batch_size))
    if kind not in FACTOR or (kind == "nan" and engine.groups.rank != engine.groups.world_size - 1):
        return original(engine, batches, first_samples, lr)
    if kind in ("moved", "taken") and engine.groups.rank == 0:
        {"moved": move, "taken": take}[kind](run_folder(engine.config))
    hook = engine.module.final_norm.register_forward_hook(
        lambda module, inputs, output: output * FACTOR[kind]
    )
    try:
        return original(engine, batches, first_samples, lr)
    finally:
        hook.remove()


def read_batches(run: Run) -> Any:
    last = run.engine.groups.rank == run.engine.groups.world_size - 1
    kind = FAULTS.get(str(run.progress.position // run.config.train.global_batch_size))
    if last and kind == "moved, hang":
        move(run_folder(run.config))
    if last and kind in ("hang", "moved, hang"):
        time.sleep(1000)
    if last and kind == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "die":
        os._exit(9)
    if last and kind == "unreadable":
        return [], [], OSError("data.bin: Input/output error")
    return original_read(run)


def open_data(*arguments: Any) -> Any:
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1) and FAULTS.get("start"):
        if FAULTS["start"] == "die":
            os._exit(9)
        time.sleep(1000)
    return original_open(*arguments)


def write_tensors(*arguments: Any) -> Any:
    if FAULTS.get("write") == "moved":
        written = original_write(*arguments)
        move(arguments[0].parents[1])
        return written
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1) and FAULTS.get("write"):
        time.sleep(1000)
    return original_write(*arguments)


original_write, saving.write_tensors = saving.write_tensors, write_tensors
original_open, start.open_data = start.open_data, open_data
Engine.train_step = train_step  # type: ignore[method-assign]
original_read, loop._read_batches = loop._read_batches, read_batches
leave(main(sys.argv[1:]))
