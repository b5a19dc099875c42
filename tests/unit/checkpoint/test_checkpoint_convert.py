"""Converting checkpoints of random numbers: every bit against the unsharded state, and what is refused."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import (
    KINDS,
    State,
    convert_in,
    flip_bit,
    manifest_of,
    random_checkpoint,
    reassembled,
    specs_of,
    universal_in,
)
from support.models import MODELS

from megatron_lpa.checkpoint import convert as convert_module
from megatron_lpa.checkpoint.convert import TargetLayout, convert
from megatron_lpa.checkpoint.convert_source import find_source
from megatron_lpa.checkpoint.manifest import DamagedCheckpoint, read_manifest, sealed, verify_files
from megatron_lpa.checkpoint.tensor_file import write_weights
from megatron_lpa.checkpoint.universal import write_universal
from megatron_lpa.checkpoint.weights import load_decoder
from megatron_lpa.errors import UserError
from megatron_lpa.run_folder import MANIFEST

MODEL = MODELS["s1_low_all"]
NAME = "step_00000007"


def assert_same_bits(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key].view(torch.int32), value.view(torch.int32)), key


@pytest.mark.parametrize(
    ("tp", "dp", "lowdim"),
    [(1, 1, "latent"), (1, 3, "column_row"), (2, 2, "latent"), (4, 1, "column_row"), (4, 2, "latent")],
)
def test_every_bit_of_the_state_arrives_once_and_the_files_are_equally_large(
    tmp_path: Path, saved: tuple[Path, State], tp: int, dp: int, lowdim: str
) -> None:
    run, state = saved
    output = tmp_path / NAME
    convert_in(run, output, tp, dp, lowdim)
    assert_same_bits(reassembled(output, MODEL, tp, lowdim), state)
    files = sorted((output / "state").iterdir())
    assert [path.name for path in files] == [f"rank_{rank:05d}.safetensors" for rank in range(tp * dp)]
    elements = [sum(value.numel() for value in load_file(path).values()) for path in files]
    assert max(elements) - min(elements) <= len(state)  # one element per parameter and kind


def test_the_manifest_is_the_source_s_but_for_layout_and_files(
    tmp_path: Path, saved: tuple[Path, State]
) -> None:
    run, _ = saved
    convert_in(run, tmp_path / "deep" / NAME, 4, 2, "column_row")
    found = read_manifest(tmp_path / "deep" / NAME)
    verify_files(tmp_path / "deep" / NAME, found, found["files"])
    before, after = manifest_of(run / "checkpoints" / NAME), manifest_of(tmp_path / "deep" / NAME)
    for key in ("format", "versions", "progress", "validation_loss", "decisions", "order", "model", "config"):
        assert after[key] == before[key], key
    moved = {"tensor_parallel_size": 4, "data_parallel_size": 2, "lowdim_layout": "column_row"}
    assert after["layout"] == {**before["layout"], **moved}
    assert after["converted"]["layout"] == before["layout"]
    expected = {
        n: {"shape": [*s.shape], "tp_dim": s.tp_dim} for n, s in specs_of(MODEL, "column_row").items()
    }
    assert after["state"] == {**before["state"], "parameters": expected}
    assert expected != before["state"]["parameters"]
    assert len(after["files"]) == 9


def test_there_and_back_again_is_byte_for_byte_the_same(tmp_path: Path, saved: tuple[Path, State]) -> None:
    convert_in(saved[0], tmp_path / "a" / NAME, 2, 2)
    convert_in(tmp_path / "a" / NAME, tmp_path / "b" / NAME, 4, 1, "column_row")
    convert_in(tmp_path / "b" / NAME, tmp_path / "c" / NAME, 2, 2)
    files = manifest_of(tmp_path / "a" / NAME)["files"]
    assert manifest_of(tmp_path / "c" / NAME)["files"] == files
    assert manifest_of(tmp_path / "b" / NAME)["files"] != files


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_weights_are_the_masters_in_the_precision_asked_for(
    tmp_path: Path, saved: tuple[Path, State], dtype: str | None
) -> None:
    run, state = saved
    convert(find_source(run), tmp_path / NAME, TargetLayout(1, 1, "latent"), dtype)
    weights = load_file(tmp_path / NAME / "weights" / "model.safetensors")
    expected = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert weights.keys() == {name for name, _ in state}
    for name, value in weights.items():
        assert value.dtype == expected and torch.equal(value, state[name, "master"].to(expected)), name
    original = (run / "checkpoints" / NAME / "weights" / "model.safetensors").read_bytes()
    same = (tmp_path / NAME / "weights" / "model.safetensors").read_bytes() == original
    assert same == (dtype != "fp32")


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bf16", torch.bfloat16)])
def test_weights_of_a_mixed_run_stay_fp32_unless_asked_otherwise(
    tmp_path: Path, dtype: str | None, expected: torch.dtype
) -> None:
    state = random_checkpoint(tmp_path / "run" / "checkpoints", MODELS["s1_lpa"], precision="bf16_mixed")
    convert(find_source(tmp_path / "run"), tmp_path / NAME, TargetLayout(1, 1, "latent"), dtype)
    assert manifest_of(tmp_path / NAME)["layout"]["precision"] == "bf16_mixed"
    for name, value in load_file(tmp_path / NAME / "weights" / "model.safetensors").items():
        assert value.dtype == expected and torch.equal(value, state[name, "master"].to(expected)), name


def test_weights_of_several_files_are_those_that_training_writes(
    tmp_path: Path, saved: tuple[Path, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = saved
    real = convert_module._write_weights
    monkeypatch.setattr(convert_module, "_write_weights", lambda *a: real(*a, shard_bytes=9000))
    convert_in(run, tmp_path / NAME)
    found = read_manifest(tmp_path / NAME)
    verify_files(tmp_path / NAME, found, found["files"])
    as_trained = [(n, value.bfloat16()) for (n, kind), value in state.items() if kind == "master"]
    names = [file.name for file in write_weights(as_trained, tmp_path / "reference", 9000)]
    assert len(names) == 4
    assert {path.name for path in (tmp_path / NAME / "weights").iterdir()} == set(names)
    for name in names:
        written = (tmp_path / NAME / "weights" / name).read_bytes()
        assert written == (tmp_path / "reference" / name).read_bytes(), name
    decoder = load_decoder(tmp_path / NAME / "weights", MODEL)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, state[name, "master"].bfloat16().float()), name


def test_vocabulary_padding_and_a_tied_matrix_stay(tmp_path: Path) -> None:
    model = MODELS["tied_gelu_padded"]
    state = random_checkpoint(tmp_path, model, tp_size=4, lowdim="column_row")
    convert_in(tmp_path / NAME, tmp_path / "o" / NAME, 2, 2)
    assert_same_bits(reassembled(tmp_path / "o" / NAME, model, 2, "latent"), state)
    assert not [name for name, _ in state if name.startswith("head.")]


def test_a_state_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    state = random_checkpoint(tmp_path, MODEL, optimizer_step=0)
    convert_in(tmp_path / NAME, tmp_path / "o" / NAME, 2, 1)
    assert {kind for _, kind in state} == {"master"}
    assert_same_bits(reassembled(tmp_path / "o" / NAME, MODEL, 2, "latent"), state)


def loaded(path: Path) -> object:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("optimizer_step", [5, 0])
def test_the_universal_folder_holds_whole_tensors_and_nothing_that_could_run(
    tmp_path: Path, optimizer_step: int
) -> None:
    state = random_checkpoint(tmp_path, MODEL, lowdim="column_row", optimizer_step=optimizer_step)
    written = write_universal(find_source(tmp_path / NAME), tmp_path / "o")
    assert (tmp_path / "o" / "latest_universal").read_text() == NAME
    zero = tmp_path / "o" / NAME / "zero"
    specs = specs_of(MODEL, "column_row")
    assert {path.name for path in zero.iterdir() if path.is_dir()} == set(specs)
    for name, spec in specs.items():
        assert {path.name for path in (zero / name).iterdir()} == {
            "fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt",
        }  # fmt: skip
        for kind, file_name in zip(KINDS, ("fp32", "exp_avg", "exp_avg_sq"), strict=True):
            content = loaded(zero / name / f"{file_name}.pt")
            assert isinstance(content, dict) and content.get("cat_dim") == spec.tp_dim
            expected = state.get((name, kind), torch.zeros(spec.shape))
            assert content["param"].dtype == torch.float32 and torch.equal(content["param"], expected)
            size = (zero / name / f"{file_name}.pt").stat().st_size
            assert size < 4 * expected.numel() + 4096  # a view would have taken what it is a view of with it
        step = loaded(zero / name / "step.pt")
        assert isinstance(step, torch.Tensor) and step == optimizer_step and step.dtype == torch.float32
    counters = loaded(tmp_path / "o" / NAME / "mp_rank_00_model_states.pt")
    assert isinstance(counters, dict)
    assert (counters["global_steps"], counters["global_samples"], counters["skipped_steps"]) == (7, 56, 2)
    assert counters["megatron_lpa"]["progress"]["consumed_tokens"] == 693
    files = [path for path in (tmp_path / "o").rglob("*") if path.is_file()]
    assert written.files == len(files)
    assert written.bytes == sum(path.stat().st_size for path in files)
    for path in files:
        if path.suffix == ".pt":
            assert zipfile.ZipFile(path).testzip() is None
            loaded(path)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "o" / NAME, capture_output=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(files) - 2


def test_the_universal_tensors_are_cut_for_the_layout_asked_for(
    tmp_path: Path, saved: tuple[Path, State]
) -> None:
    write_universal(find_source(saved[0]), tmp_path / "o", "column_row")
    specs = specs_of(MODEL, "column_row")
    changed = [name for name, spec in specs_of(MODEL, "latent").items() if spec.tp_dim != specs[name].tp_dim]
    assert changed
    for name in changed:
        content = loaded(tmp_path / "o" / NAME / "zero" / name / "fp32.pt")
        assert isinstance(content, dict) and content["cat_dim"] == specs[name].tp_dim


def test_the_newest_intact_checkpoint_of_a_run_or_the_one_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        random_checkpoint(folder, MODEL, step)
    flip_bit(folder / "step_00000003" / "state" / "rank_00001.safetensors")
    found = find_source(tmp_path)
    assert found.progress.step == 2
    assert len(found.notes) == 1 and found.notes[0].startswith("step_00000003 was passed over: ")
    assert str(folder / "step_00000003" / "state" / "rank_00001.safetensors") in found.notes[0]
    assert find_source(tmp_path, 1).progress.step == 1
    with pytest.raises(DamagedCheckpoint, match=r"step_00000003/state/rank_00001\.safetensors: the contents"):
        find_source(tmp_path, 3)
    with pytest.raises(UserError, match="holds no complete checkpoint of step 4; it has: 1, 2, 3"):
        find_source(tmp_path, 4)
    with pytest.raises(UserError, match="is not a run folder: leave --step out"):
        find_source(folder / "step_00000001", 1)
    with pytest.raises(UserError, match="no such folder"):
        find_source(tmp_path / "nowhere")
    with pytest.raises(DamagedCheckpoint, match="not a complete checkpoint"):
        find_source(folder)
    for step in (1, 2):
        flip_bit(folder / f"step_0000000{step}" / "weights" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"no complete checkpoint that is intact; step_00000003 was .* step_00000001"
    ):
        find_source(tmp_path)


@pytest.mark.parametrize("file", ["state/rank_00002.safetensors", "weights/model.safetensors", MANIFEST])
def test_a_damaged_source_is_refused_by_name_before_anything_is_written(tmp_path: Path, file: str) -> None:
    random_checkpoint(tmp_path, MODEL)
    flip_bit(tmp_path / NAME / file)
    with pytest.raises(DamagedCheckpoint, match=file):
        convert_in(tmp_path / NAME, tmp_path / "o")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("write", [convert_in, universal_in])
def test_a_fragment_that_no_file_holds_leaves_nothing(
    tmp_path: Path, write: Callable[[Path, Path], object]
) -> None:
    """Only a fault in writing could make such a source, whose every hash is right."""
    random_checkpoint(tmp_path, MODEL)
    manifest = manifest_of(tmp_path / NAME)
    del manifest["files"]["state/rank_00001.safetensors"]
    (tmp_path / NAME / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(DamagedCheckpoint, match="is in no file"):
        write(tmp_path / NAME, tmp_path / "o")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_model_or_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, MODEL)
    original = manifest_of(tmp_path / NAME)

    def refused(section: str, change: dict[str, object], match: str) -> None:
        changed = {**original, section: {**original[section], **change}}
        (tmp_path / NAME / MANIFEST).write_text(json.dumps(sealed(changed)))
        with pytest.raises(UserError, match=match):
            convert_in(tmp_path / NAME, tmp_path / "o")

    refused("model", {"experts": 8}, "has other settings than this version knows")
    refused("model", {"num_layers": 3}, "its parameters are not those that this version builds")
    refused("state", {"format": 2}, "state of format 2; this version reads 1")


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        (
            TargetLayout(3, 1, "latent"),
            "--tensor-parallel-size 3 does not divide dimension 0 of token_embedding",
        ),
        (TargetLayout(0, 1, "latent"), "--tensor-parallel-size 0: has to be 1 or more"),
        (TargetLayout(1, -1, "latent"), "--data-parallel-size -1: has to be 1 or more"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    tmp_path: Path, saved: tuple[Path, State], layout: TargetLayout, match: str
) -> None:
    with pytest.raises(UserError, match=match):
        convert(find_source(saved[0]), tmp_path / "o", layout)
    assert not any(tmp_path.iterdir())
