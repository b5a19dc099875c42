"""The structure of docs/adding_a_structure.md from training to conversion. Run with the copy of the package
that has it.

PYTHONPATH=<copy>:tests python tests/support/page_structure_run.py FOLDER
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.test_checkpoint_layouts import (
    EVERY_PARAMETER,
    Layout,
    assert_same_bits,
    check_pair,
    train_and_save,
)
from distributed.test_tensor_parallel import random_ids, sharded_results, unsharded_weights
from safetensors.torch import load_file

from megatron_lpa.config import (
    ParallelConfig,
    ProjectionConfig,
    ProjectionsConfig,
    load_config,
    validate_config,
)
from megatron_lpa.errors import UserError
from megatron_lpa.layers.sublayers import Attention
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import merge, spec_of
from megatron_lpa.planning.memory import saved_bytes_per_token_layer
from megatron_lpa.planning.parameters import count_parameters, parameters_per_tensor_rank
from megatron_lpa.planning.traffic import collective_elements_per_token
from support import reference
from support.checkpoints import reassembled
from support.models import SETTING_1
from support.world import World

ROOT = Path(__file__).resolve().parents[2]
PAIR = ProjectionConfig("blockdense", 16, blocks=4)
MODEL = replace(
    SETTING_1,
    projections=ProjectionsConfig(
        q=PAIR, k=replace(PAIR, by_layer={"0": "dense"}), v=replace(PAIR, by_layer={"1": 8}), o=PAIR,
        up=replace(PAIR, bias="none"), down=PAIR,
    ),
)  # fmt: skip
LAYOUTS = [
    Layout(2, 1, "zero1", "latent"),
    Layout(4, 2, "zero3", "column_row"),
    Layout(2, 2, "zero2", "latent"),
    Layout(2, 1, EVERY_PARAMETER, "column_row"),
]


def whole_matrices(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same model with the factors multiplied: what the reference decoder knows."""
    found = dict(weights)
    for name in [name for name in weights if name.endswith(("_a", ".a")) and f"{name[:-1]}w_b" in weights]:
        prefix = name[:-1]
        found[f"{prefix}weight"] = found.pop(f"{prefix}w_b") @ torch.block_diag(*found.pop(name))
    return found


def equals_the_unsharded_reference(world: World, tp_size: int) -> None:
    weights = unsharded_weights(MODEL)
    assert weights["layers.1.attention.qkv.q_a"].shape == (4, 4, 8)
    results = world.run(sharded_results, tp_size, "latent", MODEL, weights)[:tp_size]
    exact = {key: value.double().requires_grad_() for key, value in weights.items()}
    ids = random_ids(MODEL)
    losses = reference.token_losses(whole_matrices(exact), MODEL, ids[:, :-1], ids[:, 1:])
    losses.mean().backward()
    found = torch.from_numpy(results[0]["losses"]).double()
    torch.testing.assert_close(found, losses.detach(), rtol=1e-5, atol=1e-5)
    largest = max(float(p.grad.abs().max()) for p in exact.values())
    for key, expected in exact.items():
        shards = [torch.from_numpy(result["gradients"][key]) for result in results]
        merged = merge(shards, results[0]["specs"][key]).double()
        torch.testing.assert_close(merged, expected.grad, rtol=1e-4, atol=1e-6 * largest, msg=key)


def traffic(world_size: int) -> tuple[int, int]:
    """Elements that one layer's attention moves on this rank, forward and backward."""
    from megatron_lpa.config import KernelConfig
    from support.world import groups_for

    groups = groups_for(world_size)
    attention = Attention(MODEL.at_layer(1), groups, "latent", KernelConfig())
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    y = attention(torch.randn(1, 12, MODEL.hidden_size, requires_grad=True), None)
    forward = sum(groups.traffic.elements.values())
    groups.traffic.reset()
    y.sum().backward()
    return forward, sum(groups.traffic.elements.values())


def costs_are_those_of_what_is_built(world: World) -> None:
    decoder = Decoder(MODEL, ParallelGroups.single())
    assert sum(p.numel() for p in decoder.parameters()) == count_parameters(MODEL).total
    for size in (1, 2):
        shapes = [spec_of(p).local_shape(size) for p in decoder.parameters()]
        own = sum(int(np.prod(shape)) for shape in shapes)
        assert parameters_per_tensor_rank(MODEL, ParallelConfig(size)) == own
    one_layer = replace(MODEL.at_layer(1), num_layers=1)
    moved = collective_elements_per_token(one_layer, ParallelConfig(2))
    factor = 12 / 2  # tokens, and (T - 1) / T
    expected = (moved.attention_forward * factor, moved.attention_backward * factor)
    assert world.run(traffic, 2)[0] == expected
    from megatron_lpa.config import TrainConfig

    kept = [
        saved_bytes_per_token_layer(one_layer, ParallelConfig(size), TrainConfig(precision="fp32"))[0]
        for size in (1, 2)
    ]
    # Halved: q, k, v, attention's output, the log-sum-exp, the FFN's output; the latents of o and down. Not
    # those of q, k, v, up, which every rank gathers.
    assert kept[0] - kept[1] == 4 * (4 * 32 + 4 + 48 + 2 * 16) // 2


def moves_between_layouts(world: dict[int, World], folder: Path) -> None:
    for number, source in enumerate(LAYOUTS[:3]):
        own = folder / str(number)
        saved = world[source.processes].run(train_and_save, source.config(MODEL), str(own))[0]
        target = OfModel(LAYOUTS[number + 1])
        check_pair(lambda n: world[n], saved, source, target, own / "step_00000002")
        converts(own / "step_00000002", saved[0])


class OfModel:
    """A layout with the page's model."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def config(self):
        return self.layout.config(MODEL)

    def __getattr__(self, name: str):
        return getattr(self.layout, name)


def tool(name: str, *argv: object) -> str:
    output = io.StringIO()
    main = runpy.run_path(str(ROOT / "tools" / name))["main"]
    with contextlib.redirect_stdout(output):
        assert main([*map(str, argv)]) == 0
    return output.getvalue()


def converts(checkpoint: Path, state: dict) -> None:
    native = checkpoint.parent / "native" / checkpoint.name
    native.parent.mkdir()
    tool("convert_checkpoint.py", checkpoint, "--output", native, "--tensor-parallel-size", 2,
         "--data-parallel-size", 3, "--lowdim-layout", "column_row")  # fmt: skip
    found = {key: value.numpy() for key, value in reassembled(native, MODEL, 2, "column_row").items()}
    assert_same_bits(found, state)
    weights = load_file(native / "weights" / "model.safetensors")
    assert {n: w.shape for n, w in weights.items()} == {
        n: v.shape for (n, k), v in state.items() if k == "master"
    }
    universal = checkpoint.parent / "universal"
    tool("convert_checkpoint.py", checkpoint, "--output", universal, "--to", "universal")
    for (name, kind), value in state.items():
        path = universal / checkpoint.name / "zero" / name / f"{'fp32' if kind == 'master' else kind}.pt"
        content = torch.load(path, weights_only=True)
        assert np.array_equal(content["param"].numpy(), value)
        if name == "layers.1.attention.qkv.q_a":
            assert content["cat_dim"] == 1  # the rows of every block


def wrong_numbers_are_refused() -> None:
    q = "--model.projections.q."
    good = ["--preset=tiny/lpa", "--data.prefix=x", f"{q}kind=blockdense", f"{q}blocks=4"]
    validate_config(load_config(good), 1)
    for wrong, said in {
        f"{q}blocks=0": "q.blocks is 0 but must be at least 1",
        f"{q}blocks=-2": "q.blocks is -2 but must be at least 1",
        f"{q}blocks=3": "q.blocks is 3 but does not divide model.projections.q.rank 32; use one of 1, 2, 4",
        f"{q}blocks=64": "q.blocks is 64 but does not divide",
        f"{q}blocks=null": "q.blocks is empty but model.projections.q.kind is blockdense; set the blocks",
        f"{q}kind=lowdim": "q.blocks is 4 but model.projections.q.kind is lowdim; set the kind to blockdense",
        f"{q}rank=0": "q.rank is 0 but must be at least 1",
        f"{q}rank=null": "q.rank is empty",
        f"{q}by_layer={{0: 6}}": "does not divide model.projections.q.by_layer, layers 0: rank 6",
        f"{q}bias=latent": "no bias on a latent",
        "--parallel.tensor_parallel_size=3": "not divisible by parallel.tensor_parallel_size 3",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as told:
            validate_config(load_config([*good, wrong]), None)
        assert said in str(told.value), told.value
    with pytest.raises(UserError, match="rows of a block 1 is not divisible"):
        validate_config(load_config([*good, f"{q}blocks=32", "--parallel.tensor_parallel_size=2"]), None)
    plan = json.loads(tool("plan.py", *good[:1], *good[2:], "--json"))
    assert plan["parameters"] == count_parameters(load_config(good).model).total


def main(folder: Path) -> None:
    wrong_numbers_are_refused()
    world = {size: World(size) for size in (2, 4)}
    try:
        for tp_size in (1, 2):
            equals_the_unsharded_reference(world[2], tp_size)
        costs_are_those_of_what_is_built(world[2])
        moves_between_layouts(world, folder)
    finally:
        for started in world.values():
            started.close()


if __name__ == "__main__":
    # Under its own name, by which the processes of a world find its functions.
    import support.page_structure_run

    support.page_structure_run.main(Path(sys.argv[1]))
