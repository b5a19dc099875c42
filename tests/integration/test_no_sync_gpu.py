"""Steps that only launch work: the host never waits for the GPU, except where DeepSpeed does."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import MODELS

from megatron_lpa.config import ModelConfig, OptimConfig, RunConfig, TrainConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# DeepSpeed 0.19.8 waits once or twice per optimizer step, between backward and the optimizer, for two decisions
# on the host: whether a gradient is infinite (has_overflow: .item()) and whether the norm is one
# (is_invalid_grad_norm: bool()). Stage 3 also moves the norm to the CPU (total_norm.cpu()). The other calls
# build tensors from Python numbers for these.
ALLOWED = (
    "has_overflow",
    "is_invalid_grad_norm",
    "scaled_global_norm",
    "get_grad_norm_direct",
    "complete_grad_norm_calculation_for_cpu_offload",
    "unscale_and_clip_grads",
)


@pytest.fixture
def engine_of(tmp_path: Path) -> Iterator[Callable[[RunConfig], Any]]:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    from megatron_lpa.engine.build import Engine
    from megatron_lpa.engine.launch import start_distributed, stop_distributed

    groups = start_distributed(1)
    yield lambda config: Engine(config, groups)
    stop_distributed()


def where_synchronised(act: Callable[[], object]) -> list[str]:
    """The functions on the stack of every call that waits for the GPU, our own tree's and DeepSpeed's."""
    found: list[str] = []

    def note(message: Any, *_args: Any, **_kwargs: Any) -> None:
        if "synchroniz" in str(message):
            found.append(" < ".join(frame.name for frame in reversed(traceback.extract_stack()[:-1])))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_a_step_waits_only_inside_deepspeed(engine_of, zero: str, mode: str) -> None:
    model: ModelConfig = MODELS["s2_lpa"]
    train = TrainConfig(
        steps=8, global_batch_size=4, micro_batch_size=2, deepspeed_config=zero, activation_checkpointing=mode
    )
    engine = engine_of(RunConfig(model=model, optim=OptimConfig(warmup_steps=0), train=train))
    ids = torch.randint(model.vocab_size, (2, model.sequence_length + 1))

    def step() -> None:
        engine.train_step([ids] * engine.micro_steps, [0] * engine.micro_steps, 1e-3)

    for _ in range(3):  # compilation, first allocations, DeepSpeed's trace of the modules
        step()
    torch.cuda.synchronize()
    waits = [stack for _ in range(3) for stack in where_synchronised(step)]
    assert [s for s in waits if not any(name in s for name in ALLOWED)] == []
    assert [s for _ in range(2) for s in where_synchronised(lambda: engine.losses(ids))] == []
