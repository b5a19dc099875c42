"""Checkpoints of an earlier version hold, in any layout of today, what safetensors itself reads from their
files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from distributed.test_checkpoint_layouts import State, unsharded_state
from safetensors.torch import load_file
from support.checkpoints import reassembled
from support.world import groups_for

from megatron_lpa.checkpoint.manifest import MANIFEST, layout_in
from megatron_lpa.checkpoint.progress import SampleOrder
from megatron_lpa.config import RunConfig, load_config

RUNS = Path(__file__).parents[1] / "data/earlier_run/run_folders"


def loaded(run: RunConfig, checkpoint: str, order: SampleOrder) -> tuple[int, State, dict[str, np.ndarray]]:
    """AdamW's step, masters and moments, and on rank 0 the weights that compute, after loading."""
    from megatron_lpa.checkpoint.resume import load_checkpoint
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(run.parallel.tensor_parallel_size))
    state = EngineState(engine)
    load_checkpoint(state, Path(checkpoint), order)
    step, found = state.optimizer_step(), unsharded_state(engine)
    weights = {n: value.float().numpy() for n, value in state.gathered_weights() if value is not None}
    engine.destroy()
    return step, found, weights


@pytest.mark.parametrize(
    ("name", "step", "processes", "tp_size", "zero", "layout"),
    [
        ("one_process", 3, 1, 1, "zero1", "column_row"),
        ("one_process", 6, 2, 2, "zero0", "latent"),
        ("one_process", 6, 2, 1, "zero2", "column_row"),
        ("two_processes", 6, 1, 1, "zero3", "latent"),
        ("two_processes", 3, 2, 2, "zero3", "column_row"),
        ("two_processes", 6, 2, 1, "zero1", "column_row"),
    ],
)
def test_masters_moments_and_weights_are_those_in_the_files(
    world, name, step, processes, tp_size, zero, layout
):
    checkpoint = RUNS / name / f"checkpoints/step_{step:08d}"
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert manifest["layout"]["lowdim_layout"] == {"one_process": "latent", "two_processes": "rank"}[name]
    recorded = load_config(["--config", str(RUNS / name / "config.yaml")])
    saved_layout = {"one_process": "latent", "two_processes": "column_row"}[name]
    assert recorded.parallel.lowdim_layout == layout_in(manifest)["lowdim_layout"] == saved_layout
    run = load_config(
        ["--config", str(RUNS / name / "config.yaml"), "--parallel.tensor_parallel_size", str(tp_size),
         "--parallel.lowdim_layout", layout, "--train.deepspeed_config", zero, "--model.pad_vocab_to_multiple_of", "2"]  # noqa: E501
    )  # fmt: skip
    saved_tp = manifest["layout"]["tensor_parallel_size"]
    state = reassembled(checkpoint, recorded.model, saved_tp, saved_layout)
    used = load_file(checkpoint / "weights/model.safetensors")
    order = SampleOrder(**manifest["order"])
    results = world(processes).run(loaded, run, str(checkpoint), order)
    for rank, (optimizer_step, found, weights) in enumerate(results):
        assert optimizer_step == step
        assert found.keys() == state.keys()
        for key, value in state.items():
            same_bits(found[key], value.numpy())
        assert weights.keys() == (used.keys() if rank == 0 else set())
        for parameter, value in weights.items():
            same_bits(value, used[parameter].float().numpy())


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Rows of padding, of which the layout decides how many there are, are zero."""
    rows = min(len(found), len(expected))
    assert np.array_equal(found[:rows].view(np.int32), expected[:rows].view(np.int32))
    assert not found[rows:].any() and not expected[rows:].any() and abs(len(found) - len(expected)) <= 1
