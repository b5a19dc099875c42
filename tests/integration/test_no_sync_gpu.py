"""Steps that only launch work: the host waits for the GPU once per step, and where DeepSpeed does."""

from __future__ import annotations

import traceback
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import MODELS

from megatron_lpa.config import OptimConfig, RunConfig, TrainConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# What DeepSpeed 0.19.8 waits for in a step, as "file.function".
#
# Once or twice per optimizer step, between backward and the optimizer, for decisions on the host: whether a
# gradient is infinite (.item()), whether the norm is one (bool()); stage 3 also moves the norm to the CPU.
# The other functions build tensors from Python numbers for these.
DECISIONS = (
    "has_overflow",
    "is_invalid_grad_norm",
    "scaled_global_norm",
    "get_grad_norm_direct",
    "complete_grad_norm_calculation_for_cpu_offload",
    "unscale_and_clip_grads",
)
# Stage 3, on streams of its own: the end of each micro-batch's reductions, gathers on one process (which copy
# nothing), and reductions and gathers that have run far ahead of the device.
STREAMS = (
    "stage3.independent_gradient_partition_epilogue",
    "partition_parameters.wait",
    "stage3.__reduce_and_partition_ipg_grads",
    "partitioned_param_coordinator._fetch_sub_module_impl",
)
# Stage 2 with overlap_comm, for the whole device, once or twice per micro-batch.
DEVICE = (
    "stage_1_and_2.independent_gradient_partition_epilogue",
    "stage_1_and_2.allreduce_and_copy",
    "stage_1_and_2._allreduce_noncontiguous_bucket_preserving_fp32",
)


EVERY_PARAMETER = str(Path(__file__).parents[1] / "support" / "zero3_every_parameter.json")
"""The shipped file keeps small parameters whole, which is all that the model here has."""


@pytest.fixture
def engine_of() -> Iterator[Callable[[RunConfig, bool], Any]]:
    """Builds an engine of one process: as training does, or with DeepSpeed, as with several replicas."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    from megatron_lpa.engine import build
    from megatron_lpa.engine.joining import start_distributed, stop_distributed

    groups = start_distributed(1)

    def engine(config: RunConfig, deepspeed: bool) -> Any:
        with unittest.mock.patch.object(build, "needs_deepspeed", lambda _: deepspeed):
            return build.build_engine(config, groups)

    yield engine
    stop_distributed()


def stack() -> str:
    """The callers, the innermost first, each as "file.function"."""
    frames = reversed(traceback.extract_stack()[:-2])
    return " < ".join(f"{Path(frame.filename).stem}.{frame.name}" for frame in frames)


def where_waiting(act: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Stacks of every call that waits for a stream, an event or a value, and of every wait for the whole
    device.

    PyTorch's debug mode sees the first kind except events, and nothing of the second.
    """
    waits: list[str] = []
    device_waits: list[str] = []

    def note(message: Any, *_args: Any, **_kwargs: Any) -> None:
        # Not the mode's own notice, once per process, that it does not see everything.
        if "called a synchronizing" in str(message):
            waits.append(stack())

    def noting(found: list[str], wait: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            found.append(stack())
            return wait(*args, **kwargs)  # DeepSpeed frees memory after some of these

        return noted

    with (
        warnings.catch_warnings(),
        unittest.mock.patch.object(torch.cuda, "synchronize", noting(device_waits, torch.cuda.synchronize)),
        unittest.mock.patch.object(
            torch.cuda.Event, "synchronize", noting(waits, torch.cuda.Event.synchronize)
        ),
    ):
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return waits, device_waits


def not_named(stacks: list[str], names: tuple[str, ...]) -> list[str]:
    return [stack for stack in stacks if not any(name in stack for name in names)]


def run_of(zero: str, mode: str, precision: str = "bf16") -> RunConfig:
    train = TrainConfig(
        steps=8, global_batch_size=4, micro_batch_size=2, precision=precision, deepspeed_config=zero,
        activation_checkpointing=mode,
    )  # fmt: skip
    return RunConfig(model=MODELS["s2_lpa"], optim=OptimConfig(warmup_steps=0), train=train)


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
def test_a_step_of_one_replica_waits_once(engine_of, precision: str, mode: str) -> None:
    engine = engine_of(run_of("zero3", mode, precision), False)
    ids = torch.randint(64, (2, engine.config.model.sequence_length + 1))

    def step() -> None:
        engine.train_step([ids] * engine.micro_steps, [0] * engine.micro_steps, 1e-3)

    for _ in range(3):  # compilation, first allocations
        step()
    torch.cuda.synchronize()
    for _ in range(3):
        (wait,), device_waits = where_waiting(step)
        assert wait.startswith("stepping.update") and device_waits == []
    assert where_waiting(lambda: engine.losses(ids)) == ([], [])


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", EVERY_PARAMETER])
def test_a_step_waits_only_inside_deepspeed(engine_of, zero: str, mode: str) -> None:
    model = MODELS["s2_lpa"]
    engine = engine_of(run_of(zero, mode), True)
    ids = torch.randint(model.vocab_size, (2, model.sequence_length + 1))

    def step() -> None:
        engine.train_step([ids] * engine.micro_steps, [0] * engine.micro_steps, 1e-3)

    for _ in range(3):  # compilation, first allocations, DeepSpeed's trace of the modules
        step()
    torch.cuda.synchronize()
    found = [where_waiting(step) for _ in range(3)]
    waits, device_waits = ([stack for pair in found for stack in pair[kind]] for kind in (0, 1))
    assert not_named(waits, DECISIONS + STREAMS) == []
    assert not_named(device_waits, DEVICE if zero == "zero2" else ()) == []
    for _ in range(2):
        waits, device_waits = where_waiting(lambda: engine.losses(ids))
        assert not_named(waits, STREAMS) == [] and device_waits == []
