"""Checkpoints that are written beside training hold what a checkpoint written at once would."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from distributed.test_checkpoint import ORDER, config, step
from support.world import groups_for

from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.config import RunConfig
from megatron_lpa.run_folder import MANIFEST


def saved_beside_training(run: RunConfig, folder: str) -> list[tuple[float, float]]:
    """At once after two steps; the same state again while two more steps are done."""
    from megatron_lpa.checkpoint import saving
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    for number in range(2):
        step(engine, number)
    saving.begin_save(EngineState(engine), Path(folder) / "at_once", Progress(2), ORDER).complete()

    written, go_on = saving.write_tensors, threading.Event()

    def held_up(*arguments):
        assert go_on.wait(60)
        return written(*arguments)

    saving.write_tensors = held_up
    try:
        pending = saving.begin_save(
            EngineState(engine), Path(folder) / "beside", Progress(2), ORDER, overlap=True
        )
        losses = [step(engine, number) for number in (2, 3)]
        assert not pending.written_here
        assert not [*(Path(folder) / "beside").glob("step_*")]  # nothing half-written looks whole
        go_on.set()
        pending.complete()
        assert pending.written_here and pending.bytes > 0
    finally:
        go_on.set()
        saving.write_tensors = written
    engine.destroy()
    return losses


@pytest.mark.parametrize(
    ("processes", "name", "tp_size", "zero", "precision"),
    [
        (1, "s1_lpa", 1, "zero0", "fp32"),
        (2, "s2_low_all", 1, "zero2", "bf16"),
        (4, "s2_lpa", 2, "zero3", "bf16"),
        (2, "s2_lpa", 1, "zero3_offload", "fp32"),
    ],
)
def test_the_state_is_that_of_the_step_at_which_saving_began(
    world, tmp_path, processes, name, tp_size, zero, precision
):
    run = config(name, tp_size, zero, precision=precision)
    losses = world(processes).run(saved_beside_training, run, str(tmp_path))
    assert len({tuple(both) for both in losses}) == 1
    manifests = [
        json.loads((tmp_path / kind / "step_00000002" / MANIFEST).read_text())
        for kind in ("at_once", "beside")
    ]
    assert manifests[0]["files"] == manifests[1]["files"]  # names, lengths and hashes
    assert len(manifests[0]["files"]) == processes + 1
    for file, described in manifests[1]["files"].items():
        assert (tmp_path / "beside" / "step_00000002" / file).stat().st_size == described["bytes"]


def failing_beside_training(run: RunConfig, folder: str, error: str) -> str:
    from megatron_lpa.checkpoint import saving
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(1))
    step(engine, 0)
    pending = saving.begin_save(EngineState(engine), Path(folder), Progress(1), ORDER, overlap=True)
    pending.complete()
    written = saving.write_tensors
    if engine.groups.rank == 1:

        def failing(*_):
            raise {"disk": OSError("the disk is full"), "bug": AssertionError("a bug")}[error]

        saving.write_tensors = failing
    try:
        pending = saving.begin_save(EngineState(engine), Path(folder), Progress(2), ORDER, overlap=True)
        step(engine, 1)
        pending.complete()
    except saving.CheckpointNotWritten as caught:
        return str(caught)
    finally:
        saving.write_tensors = written
        engine.destroy()
    return ""


@pytest.mark.parametrize(("error", "said"), [("disk", "the disk is full"), ("bug", "AssertionError: a bug")])
def test_a_failure_in_one_process_s_thread_is_every_process_s(world, tmp_path, error, said):
    messages = world(2).run(failing_beside_training, config("s2_lpa", 1, "zero3"), str(tmp_path), error)
    for message in messages:
        assert f"rank 1: {said}" in message and "the newest complete checkpoint is untouched" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def without_memory(run: RunConfig, folder: str, of: str) -> str:
    """A save beside training, while copies to the CPU fail on the first process alone; then another without
    that."""
    from megatron_lpa.checkpoint import saving
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    step(engine, 0)
    words, said = "DefaultCPUAllocator: can't allocate memory", ""
    to, cpu = torch.Tensor.to, torch.Tensor.cpu

    def failing_to(tensor, *arguments, **options):
        if options.get("copy"):
            raise RuntimeError(words)
        return to(tensor, *arguments, **options)

    def failing_cpu(tensor, *arguments, **options):
        if tensor.is_floating_point():  # not what torch itself sends objects in
            raise RuntimeError(words)
        return cpu(tensor, *arguments, **options)

    try:
        if engine.groups.rank == 0 and of == "state":
            torch.Tensor.to = failing_to
        elif engine.groups.rank == 0:
            torch.Tensor.cpu = failing_cpu
        saving.begin_save(EngineState(engine), Path(folder), Progress(1), ORDER, overlap=True)
    except saving.CheckpointNotWritten as error:
        said = str(error)
    finally:
        torch.Tensor.to, torch.Tensor.cpu = to, cpu
    saving.begin_save(EngineState(engine), Path(folder), Progress(1), ORDER, overlap=True).complete()
    engine.destroy()
    return said


@pytest.mark.parametrize(("of", "zero", "tp_size"), [("state", "zero1", 1), ("weights", "zero3", 2)])
def test_too_little_memory_for_the_copy_on_one_process_is_every_process_s(world, tmp_path, of, zero, tp_size):
    for message in world(2).run(without_memory, config("s2_lpa", tp_size, zero), str(tmp_path), of):
        assert "rank 0: DefaultCPUAllocator: can't allocate memory" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
