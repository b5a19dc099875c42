"""Converted checkpoints in real engines: ours in several layouts, and DeepSpeed's own loader of universal
folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.models import MODELS
from support.world import groups_for
from test_checkpoint_layouts import (
    BATCH,
    KINDS,
    ORDER,
    Layout,
    State,
    assert_same_bits,
    resume_elsewhere,
    step,
    train_and_save,
    unsharded_state,
)

from megatron_lpa.checkpoint.convert import TargetLayout, convert
from megatron_lpa.checkpoint.convert_source import find_source
from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.checkpoint.universal import write_universal
from megatron_lpa.config import RunConfig

NAME = "step_00000002"
MODEL = MODELS["s1_low_all"]
SOURCE = Layout(4, 2, "zero3", "column_row", "bf16")


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory) -> tuple[Path, State, list[float]]:
    """A checkpoint of ZeRO-3 over 2 x 2 processes, the state that DeepSpeed gathered, and the losses of two
    more steps."""
    folder = tmp_path_factory.mktemp("saved")
    state, losses = world(4).run(train_and_save, SOURCE.config(), str(folder))[0]
    return folder / NAME, state, losses


@pytest.mark.parametrize(
    ("target", "resumed_in"),
    [
        (TargetLayout(1, 2, "latent"), Layout(2, 1, "zero1", "latent", "bf16", 4)),
        (TargetLayout(4, 1, "latent"), Layout(4, 4, "zero2", "latent")),
        (
            TargetLayout(2, 3, "column_row"),
            Layout(1, 1, "zero0", "column_row"),
        ),  # in another layout than it was cut for
    ],
    ids=str,
)
def test_a_converted_checkpoint_resumes_exactly_like_the_original(world, saved, tmp_path, target, resumed_in):
    original, expected, losses = saved
    convert(find_source(original), tmp_path / NAME, target)
    run = resumed_in.config()
    from_original = world(resumed_in.processes).run(resume_elsewhere, run, str(original))[0]
    state, used, next_losses, steps = world(resumed_in.processes).run(
        resume_elsewhere, run, str(tmp_path / NAME)
    )[0]
    assert_same_bits(state, expected)
    assert_same_bits(used, from_original[1])
    assert (next_losses, steps) == from_original[2:]  # bit for bit, as the layout of both is the same
    assert next_losses == pytest.approx(losses, rel=2e-2)


def load_and_save_again(run: RunConfig, checkpoint: str, folder: str) -> None:
    from megatron_lpa.checkpoint.resume import load_checkpoint
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    load_checkpoint(EngineState(engine), Path(checkpoint), ORDER)
    begin_save(EngineState(engine), Path(folder), Progress(2, 2 * BATCH, 99), ORDER).complete()
    engine.destroy()


@pytest.mark.parametrize("lowdim", ["latent", "column_row"])
def test_every_file_is_byte_for_byte_what_a_run_of_that_layout_writes(world, saved, tmp_path, lowdim):
    run = Layout(4, 2, "zero0", lowdim).config()
    world(4).run(load_and_save_again, run, str(saved[0]), str(tmp_path / "run"))
    convert(find_source(saved[0]), tmp_path / NAME, TargetLayout(2, 2, lowdim), "fp32")
    expected = find_source(tmp_path / "run" / NAME).manifest
    found = find_source(tmp_path / NAME).manifest
    assert found["files"] == expected["files"] and len(found["files"]) == 5
    for section in ("progress", "order", "model", "state", "validation_loss"):
        assert found[section] == expected[section], section


@dataclass(frozen=True)
class Trainer:
    """Somebody else's trainer on DeepSpeed."""

    processes: int
    stage: int
    precision: str = "fp32"
    tp_size: int = 1
    grad_accum: str | None = None

    def config(self) -> dict[str, object]:
        share = BATCH * self.tp_size // self.processes
        found: dict[str, object] = {
            "train_micro_batch_size_per_gpu": share,
            "train_batch_size": BATCH,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 40},
            "bf16": {"enabled": self.precision == "bf16"},
            "checkpoint": {"load_universal": True},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if self.grad_accum:
            found["data_types"] = {"grad_accum_dtype": self.grad_accum}
        return found


def trainer_engine(trainer: Trainer):
    """A plain DeepSpeed engine over our decoder, whose every parameter is NaN until something is loaded."""
    import deepspeed

    from megatron_lpa.engine.build import ModelParallelUnit
    from megatron_lpa.model.transformer import Decoder

    groups = groups_for(trainer.tp_size)
    decoder = Decoder(MODEL, groups, "latent")
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(float("nan"))
    matrices = [p for p in decoder.parameters() if p.dim() == 2]
    vectors = [p for p in decoder.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [  # other groups than ours
            {"params": matrices[:3], "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
            {"params": matrices[3:], "weight_decay": 0.1},
        ],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-5, fused=True,
    )  # fmt: skip
    ds, *_ = deepspeed.initialize(
        model=decoder, optimizer=optimizer, config=trainer.config(), dist_init_required=False,
        mpu=ModelParallelUnit(groups) if trainer.tp_size > 1 else None,
    )  # fmt: skip
    return ds, groups


def one_step(ds, groups) -> float:
    """The step that our own run does next: the third, number 2."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(MODEL.vocab_size, (BATCH, MODEL.sequence_length + 1), generator=generator)
    share = BATCH // groups.dp_size
    own = ids[groups.dp_rank * share :][:share]
    for group in ds.optimizer.param_groups:
        group["lr"] = 1e-2 / 3
    loss = ds(own[:, :-1], own[:, 1:]).float().mean()
    ds.backward(loss)
    ds.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    return float(mean) / torch.distributed.get_world_size()


def load_universal(
    trainer: Trainer, folder: str
) -> tuple[State, State, float, list[float], dict[str, object]]:
    ds, groups = trainer_engine(trainer)
    _, client = ds.load_checkpoint(folder, load_lr_scheduler_states=False)
    if trainer.stage == 3:  # as the documentation says for PyTorch's AdamW
        for state in ds.optimizer.optimizer.state.values():
            state["step"] = torch.tensor(float(state["step"]))
    like_ours = SimpleNamespace(
        partition_stage=trainer.stage, optimizer=ds.optimizer, module=ds.module, groups=groups
    )
    loaded = unsharded_state(like_ours)
    loss = one_step(ds, groups)
    after = unsharded_state(like_ours)
    steps = [float(state["step"]) for state in ds.optimizer.optimizer.state.values()]
    client = {**client["megatron_lpa"]["progress"], "global_steps": ds.global_steps}
    ds.destroy()
    return loaded, after, loss, steps, client


def continue_ours(run: RunConfig, checkpoint: str) -> tuple[State, float]:
    from megatron_lpa.checkpoint.resume import load_checkpoint
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(1))
    load_checkpoint(EngineState(engine), Path(checkpoint), ORDER)
    loss = step(engine, 2)
    state = unsharded_state(engine)
    engine.destroy()
    return state, loss


@pytest.fixture(scope="module")
def ours(world, saved) -> dict[str, tuple[State, float]]:
    """Our own next step, in both precisions."""
    layouts = [Layout(1, 1, "zero1", "latent", precision, BATCH) for precision in ("fp32", "bf16")]
    return {
        layout.precision: world(1).run(continue_ours, layout.config(), str(saved[0]))[0] for layout in layouts
    }


@pytest.fixture(scope="module")
def universal(saved, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("universal") / "out"
    write_universal(find_source(saved[0]), folder, "latent")
    return folder


@pytest.mark.parametrize(
    "trainer",
    [
        Trainer(1, 1),
        Trainer(2, 1, "bf16", grad_accum="fp32"),
        Trainer(2, 2),
        Trainer(1, 2, "bf16"),
        Trainer(2, 3),
        Trainer(1, 3, "bf16"),
        Trainer(2, 1, tp_size=2),
        Trainer(4, 2, "bf16", tp_size=2),
    ],
    ids=str,
)
def test_deepspeed_loads_a_universal_folder_and_goes_on_as_we_do(world, saved, ours, universal, trainer):
    _, expected, _ = saved
    state_after, loss_after = ours[trainer.precision]
    loaded, after, loss, steps, client = world(trainer.processes).run(
        load_universal, trainer, str(universal)
    )[0]
    assert_same_bits(loaded, expected)
    assert client == {
        "step": 2, "consumed_samples": 2 * BATCH, "consumed_tokens": 99, "skipped_samples": 0,
        "global_steps": 3,
    }  # fmt: skip
    rounding = 2e-2 if trainer.precision == "bf16" else 1e-5
    assert loss == pytest.approx(loss_after, rel=rounding)
    assert set(steps) == {3.0}
    for kind in KINDS:
        groups = compared_together(list(expected), kind, trainer.precision)
        allowed = 0.1 if trainer.precision == "bf16" else 1e-3
        for some in groups:
            assert distance(after, state_after, some) <= allowed * distance(expected, state_after, some), some


def compared_together(keys: list[tuple[str, str]], kind: str, precision: str) -> list[list[tuple[str, str]]]:
    """Which parameters share one bound on the difference, relative to how far the step moved them.

    In bf16 it is all of them: some biases have gradients of mere rounding, whose direction is chance. In fp32
    it is each on its own, except the biases of the keys. A bias adds the same to the scores of all positions,
    which softmax does not see, so in exact arithmetic its gradient is zero: what is there is the rounding of
    a sum whose terms are those of the factor beside it, and goes with that factor.
    """
    keys = [key for key in keys if key[1] == kind]
    if precision == "bf16":
        return [keys]
    beside = {key: (key[0].replace("k_bias_", "k_w_"), kind) for key in keys if ".k_bias_" in key[0]}
    assert len(beside) == MODEL.num_layers and set(beside.values()) <= set(keys)
    return [[*pair] for pair in beside.items()] + [[key] for key in keys if key not in beside]


def distance(one: State, other: State, keys: list[tuple[str, str]]) -> float:
    return float(np.sqrt(sum(np.square(one[key] - other[key], dtype=np.float64).sum() for key in keys)))
