"""A state saved in one layout, read in another: equal bit for bit to the unsharded state, for every pair
tried."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.models import MODELS
from support.world import groups_for

from megatron_lpa.checkpoint.progress import Progress, SampleOrder
from megatron_lpa.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import merge, spec_of
from megatron_lpa.run_folder import MANIFEST
from megatron_lpa.structures.parameter_spec import ParameterSpec

BATCH = 8
ORDER = SampleOrder(seed=27, samples_per_epoch=1000, samples_per_step=BATCH)
KINDS = ("master", "exp_avg", "exp_avg_sq")
EVERY_PARAMETER = str(Path(__file__).parents[1] / "support" / "zero3_every_parameter.json")
State = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Layout:
    """How one run is spread; ``zero`` names a file of ``ds_configs/``."""

    processes: int
    tp_size: int
    zero: str
    lowdim: str
    precision: str = "fp32"
    micro_batch: int = 2

    def __str__(self) -> str:
        zero = Path(self.zero).stem
        dp_size = self.processes // self.tp_size
        return f"tp{self.tp_size}-dp{dp_size}-{zero}-{self.lowdim}-{self.precision}-mb{self.micro_batch}"

    def config(self, model: ModelConfig = MODELS["s1_low_all"]) -> RunConfig:
        return RunConfig(
            model=model,
            parallel=ParallelConfig(self.tp_size, self.lowdim),
            optim=OptimConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1, grad_clip=0.5),
            train=TrainConfig(
                steps=6, global_batch_size=BATCH, micro_batch_size=self.micro_batch, precision=self.precision,
                deepspeed_config=self.zero,
            ),
        )  # fmt: skip


LAYOUTS = [
    Layout(1, 1, "zero0", "latent"),
    Layout(4, 2, "zero3", "column_row"),
    Layout(2, 1, "zero1", "latent", "bf16", 4),
    Layout(2, 2, "zero2", "column_row"),
    Layout(1, 1, EVERY_PARAMETER, "column_row", "bf16", 8),
    Layout(4, 4, "zero3", "latent", "fp32", 4),
    Layout(2, 1, "zero3_offload", "column_row", "fp32", 1),
    Layout(4, 2, "zero1", "latent", "bf16"),
    Layout(2, 2, "zero0", "latent"),
    Layout(4, 2, "zero2", "column_row", "bf16", 1),
    Layout(2, 2, EVERY_PARAMETER, "latent", "bf16"),
    Layout(4, 4, "zero1", "column_row"),
    Layout(4, 1, "zero2", "latent"),
    Layout(1, 1, "zero3", "latent", "bf16_mixed", 4),
    Layout(4, 2, "zero3", "latent", "bf16_mixed"),
]


def step(engine, number: int) -> float:
    model: ModelConfig = engine.config.model
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(model.vocab_size, (BATCH, model.sequence_length + 1), generator=generator)
    share = BATCH // engine.groups.dp_size
    own = ids[engine.groups.dp_rank * share :][:share].split(engine.config.train.micro_batch_size)
    result = engine.train_step(list(own), [number * BATCH] * engine.micro_steps, 1e-2 / (1 + number))
    return float(engine.mean_over_replicas(result.loss))


def unsharded_state(engine) -> State:
    """Masters and moments by way of DeepSpeed's own gathering functions, merged over tensor-parallel
    ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.partition_stage in (1, 2):
        # DeepSpeed links moments after the first of several parameter groups has stepped, and never again.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: State = {}
    for name, parameter in engine.module.named_parameters():
        for kind in KINDS:
            if engine.groups.dp_size == 1 and engine.partition_stage == 0:
                master = engine.stepper.master_of[parameter]
                own = master if kind == "master" else engine.optimizer.state[master][kind]
            elif engine.partition_stage == 0:
                own = parameter if kind == "master" else engine.optimizer.state[parameter][kind]
            elif kind == "master":
                own = safe_get_full_fp32_param(parameter)
            else:
                own = safe_get_full_optimizer_state(parameter, kind)
            groups, spec = engine.groups, spec_of(parameter)
            own = own.detach().float().view(spec.local_shape(groups.tp_size)).contiguous()
            parts = [torch.empty_like(own) for _ in range(groups.tp_size)]
            dist.all_gather(parts, own, group=groups.tp_group)
            found[name, kind] = merge(parts, spec).clone().numpy()
    return found


def train_and_save(run: RunConfig, folder: str) -> tuple[State, list[float]]:
    """Two steps and a checkpoint; the state then, and the losses of two more steps."""
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    for number in range(2):
        step(engine, number)
    begin_save(EngineState(engine), Path(folder), Progress(2, 2 * BATCH, 99), ORDER).complete()
    state = unsharded_state(engine)
    losses = [step(engine, number) for number in range(2, 4)]
    engine.destroy()
    return (state if engine.groups.rank == 0 else {}), losses


def resume_elsewhere(run: RunConfig, checkpoint: str) -> tuple[State, State, list[float], int]:
    """The state right after loading, what computes, the losses of two more steps, and AdamW's step then."""
    from megatron_lpa.checkpoint.resume import load_checkpoint
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    other = replace(run, train=replace(run.train, seed=run.train.seed + 1))  # other initial weights
    engine = build_engine(other, groups_for(run.parallel.tensor_parallel_size))
    assert load_checkpoint(EngineState(engine), Path(checkpoint), ORDER).progress == Progress(
        2, 2 * BATCH, 99
    )
    state = unsharded_state(engine)
    used = {(name, "used"): value for name, value in EngineState(engine).gathered_weights()}
    losses = [step(engine, number) for number in range(2, 4)]
    steps = EngineState(engine).optimizer_step()
    engine.destroy()
    if engine.groups.rank != 0:
        return {}, {}, losses, steps
    return (
        state,
        {key: value.float().numpy() for key, value in used.items() if value is not None},
        losses,
        steps,
    )


def assert_same_bits(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(actual[key].view(np.int32), value.view(np.int32)), key


def check_pair(
    world, saved: tuple[State, list[float]], source: Layout, target: Layout, checkpoint: Path
) -> None:
    expected_state, expected_losses = saved
    results = world(target.processes).run(resume_elsewhere, target.config(), str(checkpoint))
    state, used, losses, _ = results[0]
    assert_same_bits(state, expected_state)
    dtype = torch.bfloat16 if target.precision == "bf16" else torch.float32
    for (name, _), value in used.items():
        master = torch.from_numpy(expected_state[name, "master"]).to(dtype).float().numpy()
        assert np.array_equal(value, master), name
    rounding = 1e-5 if {source.precision, target.precision} == {"fp32"} else 2e-2
    assert losses == pytest.approx(expected_losses, rel=rounding)
    assert {steps for _, _, _, steps in results} <= {0, 4}  # 0: nothing of the model is this rank's


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=lambda n: str(LAYOUTS[n]))
def test_a_state_is_the_same_in_any_other_layout(world, tmp_path, number):
    source = LAYOUTS[number]
    saved = world(source.processes).run(train_and_save, source.config(), str(tmp_path))[0]
    for distance in (1, 5):  # every layout is saved for two others, and read from two others
        target = LAYOUTS[(number + distance) % len(LAYOUTS)]
        check_pair(world, saved, source, target, tmp_path / "step_00000002")


@pytest.mark.parametrize("source", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[7], LAYOUTS[8]], ids=str)
def test_files_hold_every_element_once_and_together_make_the_unsharded_state(world, tmp_path, source):
    """Put together here from the files and their keys alone."""
    expected, _ = world(source.processes).run(train_and_save, source.config(), str(tmp_path))[0]
    checkpoint = tmp_path / "step_00000002"
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    shards: dict[tuple[str, str], dict[str, dict[int, torch.Tensor]]] = {}
    files = sorted((checkpoint / "state").iterdir())
    assert [path.name for path in files] == [
        f"rank_{rank:05d}.safetensors" for rank in range(source.processes)
    ]
    elements = 0
    for path in files:
        for key, value in load_file(path).items():
            name, kind, shard, start = key.split("/")
            pieces = shards.setdefault((name, kind), {}).setdefault(shard, {})
            assert int(start) not in pieces
            pieces[int(start)] = value
            elements += value.numel()
    assert elements == sum(value.size for value in expected.values())
    found: State = {}
    for (name, kind), by_shard in shards.items():
        saved = manifest["state"]["parameters"][name]
        tp_dim = saved["tp_dim"] if source.tp_size > 1 else None
        spec = ParameterSpec(tuple(saved["shape"]), "input", 1, tp_dim=tp_dim)
        names = ["whole"] if tp_dim is None else [str(rank) for rank in range(source.tp_size)]
        assert sorted(by_shard) == names
        whole = [torch.cat([by_shard[n][start] for start in sorted(by_shard[n])]) for n in names]
        full = merge([shard.view(spec.local_shape(len(names))) for shard in whole], spec)
        found[name, kind] = full.contiguous().numpy()
    assert_same_bits(found, expected)
    assert manifest["state"]["optimizer_step"] == 2


def pytorch_adamw(model: ModelConfig) -> State:
    """Two steps of plain PyTorch on a decoder of one process: no DeepSpeed, no engine."""
    from megatron_lpa.model.init import initialize
    from megatron_lpa.model.transformer import Decoder

    decoder = Decoder(model, ParallelGroups.single())
    initialize(decoder, model, ParallelGroups.single(), TrainConfig().seed)
    named = dict(decoder.named_parameters())
    groups = [
        {"params": [p for p in named.values() if spec_of(p).decays()], "weight_decay": 0.1},
        {
            "params": [p for p in named.values() if not spec_of(p).decays()],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-5)
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(model.vocab_size, (BATCH, model.sequence_length + 1), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + number)
        optimizer.zero_grad()
        decoder(ids[:, :-1], ids[:, 1:]).mean().backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        optimizer.step()
    found: State = {}
    for name, parameter in named.items():
        found[name, "master"] = parameter.detach().numpy()
        for kind in KINDS[1:]:
            found[name, kind] = optimizer.state[parameter][kind].numpy()
    return found


@pytest.mark.parametrize("source", [LAYOUTS[1], LAYOUTS[3]], ids=str)
def test_a_saved_state_is_that_of_plain_pytorch_to_rounding(world, tmp_path, source):
    state, _ = world(source.processes).run(train_and_save, source.config(), str(tmp_path))[0]
    for key, expected in pytorch_adamw(MODELS["s1_low_all"]).items():
        np.testing.assert_allclose(state[key], expected, rtol=2e-3, atol=2e-6, err_msg=str(key))


def test_vocabulary_padding_may_change_with_the_tensor_parallel_size(world, tmp_path):
    model = replace(MODELS["tied_gelu_padded"], pad_vocab_to_multiple_of=1)
    source = Layout(2, 1, "zero3", "latent")
    saved, losses = world(2).run(train_and_save, source.config(model), str(tmp_path))[0]
    checkpoint = tmp_path / "step_00000002"
    padded = replace(model, pad_vocab_to_multiple_of=12)  # 61 ids in 72 rows
    target = Layout(4, 4, "zero1", "column_row")
    state, _, next_losses, _ = world(4).run(resume_elsewhere, target.config(padded), str(checkpoint))[0]
    assert next_losses == pytest.approx(losses, rel=1e-5)
    for key, value in saved.items():
        assert np.array_equal(state[key][: len(value)], value), key
        assert not np.any(state[key][len(value) :])
    world(4).run(train_and_save, target.config(padded), str(tmp_path / "back"))
    again = world(2).run(resume_elsewhere, source.config(model), str(tmp_path / "back" / "step_00000002"))[0]
    assert again[2] == pytest.approx(losses, rel=1e-5)


def roll_back(run: RunConfig, folder: str) -> tuple[State, State, list[float], list[float]]:
    """Load into the very engine that saved and trained on, as after a divergence."""
    from megatron_lpa.checkpoint.resume import load_checkpoint
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    fresh = begin_save(EngineState(engine), Path(folder), Progress(0), ORDER).complete()
    first = step(engine, 0)
    step(engine, 1)
    path = begin_save(EngineState(engine), Path(folder), Progress(2, 2 * BATCH), ORDER).complete()
    before = unsharded_state(engine)
    losses = [first, *(step(engine, number) for number in range(2, 4))]
    load_checkpoint(EngineState(engine), path, ORDER)
    after = unsharded_state(engine)
    again = [step(engine, number) for number in range(2, 4)]
    load_checkpoint(EngineState(engine), fresh, ORDER)
    again.insert(0, step(engine, 0))
    engine.destroy()
    return before, after, losses, again


@pytest.mark.parametrize(
    "layout",
    [LAYOUTS[0], LAYOUTS[2], LAYOUTS[3], LAYOUTS[5], LAYOUTS[6], LAYOUTS[10], Layout(2, 2, "zero2",
    "column_row", "bf16")],
    ids=str,
)  # fmt: skip
def test_an_engine_that_trained_on_goes_back_exactly(world, tmp_path, layout):
    for before, after, losses, again in world(layout.processes).run(
        roll_back, layout.config(), str(tmp_path)
    ):
        assert_same_bits(after, before)
        assert again == losses
