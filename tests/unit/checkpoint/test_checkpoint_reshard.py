"""Reading ranges of shards from files of fragments, against split and merge of whole tensors."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lpa.checkpoint import reshard
from megatron_lpa.checkpoint.manifest import DamagedCheckpoint
from megatron_lpa.checkpoint.reshard import StateReader, shard_box
from megatron_lpa.checkpoint.tensor_file import fragment_key, shard_name, write_tensors
from megatron_lpa.files import sha256
from megatron_lpa.parallel.sharding import split
from megatron_lpa.structures.parameter_spec import ParameterSpec

SHAPES = [
    ((8, 12), (None, 0, 1)),
    ((24, 4), (None, 0, 1)),
    ((16,), (None, 0)),
    ((4, 8, 12), (None, 0, 1, 2)),
    ((3, 4, 2, 8), (None, 1, 3)),
    ((4, 3, 4, 2), (None, 0, 2)),
    ((2, 4, 1, 4, 4), (None, 1, 3, 4)),
    ((), (None,)),
]


def saved_in(
    folder: Path, full: torch.Tensor, tp_dim: int | None, tp_size: int, cuts: random.Random
) -> StateReader:
    """A checkpoint of one parameter, each shard cut at random places into fragments of three files."""
    spec = ParameterSpec(tuple(full.shape), "input", 1, tp_dim=tp_dim if tp_size > 1 else None)
    files: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for tp_rank in range(1 if tp_dim is None else tp_size):
        shard = split(full, spec, tp_rank, tp_size).reshape(-1)
        ends = sorted({0, *cuts.choices(range(shard.numel()), k=4), shard.numel()})
        for start, end in itertools.pairwise(ends):
            key = fragment_key("a.w", "master", shard_name(tp_dim, tp_rank, tp_size), start)
            cuts.choice(files)[key] = shard[start:end].clone()
    names = []
    folder.mkdir(exist_ok=True)
    for number, tensors in enumerate(files):
        names.append(
            write_tensors(folder, f"state/rank_{number:05d}.safetensors", list(tensors.items())).name
        )
    manifest = {
        "files": dict.fromkeys([*names, "weights/model.safetensors"]),
        "state": {"parameters": {"a.w": {"shape": list(full.shape), "tp_dim": tp_dim}}},
        "layout": {"tensor_parallel_size": tp_size},
    }
    return StateReader.open(folder, manifest)


@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
@pytest.mark.parametrize("block", [reshard.BLOCK_ELEMENTS, 17, 1])
def test_any_range_of_any_shard_comes_back_from_any_layout(tmp_path, monkeypatch, shape, dims, block):
    monkeypatch.setattr(reshard, "BLOCK_ELEMENTS", block)
    cuts = random.Random(str(shape))
    full = torch.randn(shape)
    for case, (saved_dim, saved_tp) in enumerate(itertools.product(dims, (1, 2, 4))):
        reader = saved_in(tmp_path / str(case), full, saved_dim, saved_tp, cuts)
        for dim, tp_size in itertools.product(dims, (1, 2, 4)):
            spec = ParameterSpec(shape, "input", 1, tp_dim=dim)
            for tp_rank in range(tp_size):
                expected = split(full, spec, tp_rank, tp_size).reshape(-1)
                box = shard_box(shape, dim, tp_rank, tp_size)
                ends = sorted(cuts.choices(range(expected.numel() + 1), k=2))
                for start, end in (ends, (0, expected.numel())):
                    if start < end:
                        value = reader.read("a.w", "master", box, start, end - start)
                        assert torch.equal(value, expected[start:end])


def test_rows_beyond_the_saved_ones_are_zero_and_superfluous_ones_are_left(tmp_path):
    full = torch.randn(6, 3)
    reader = saved_in(tmp_path, full, 0, 2, random.Random(0))
    more = reader.read("a.w", "master", shard_box((8, 3), 0, 1, 2), 0, 12)
    assert torch.equal(more, torch.cat((full[4:].reshape(-1), torch.zeros(6))))
    assert torch.equal(reader.read("a.w", "master", shard_box((4, 3), 0, 1, 2), 0, 6), full[2:4].reshape(-1))


def test_a_missing_fragment_is_named(tmp_path):
    reader = saved_in(tmp_path, torch.randn(8, 12), None, 1, random.Random(1))
    with pytest.raises(DamagedCheckpoint, match=r"element 0 of a\.w \(exp_avg, shard whole\) is in no file"):
        reader.read("a.w", "exp_avg", shard_box((8, 12), None, 0, 1), 0, 5)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    manifest = {
        "files": {"state/rank_00000.safetensors": None},
        "state": {"parameters": {}},
        "layout": {"tensor_parallel_size": 1},
    }
    save_file({"not a fragment": torch.zeros(2)}, tmp_path / "state" / "rank_00000.safetensors")
    with pytest.raises(DamagedCheckpoint, match="not a file of fragments"):
        StateReader.open(tmp_path, manifest)
    (tmp_path / "state" / "rank_00000.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(DamagedCheckpoint, match="not a safetensors file"):
        StateReader.open(tmp_path, manifest)


def test_written_tensors_are_what_safetensors_reads_and_the_hash_is_the_file_s(tmp_path):
    tensors = {
        "a/b": torch.randn(7),
        "c": torch.randn(4, 4).t()[1:],
        "none": torch.zeros(0),
        "half": torch.randn(3, 1)[:, 0].bfloat16(),
    }
    written = write_tensors(tmp_path, "deep/x.safetensors", list(tensors.items()), {"format": "pt"})
    path = tmp_path / "deep" / "x.safetensors"
    assert (written.bytes, written.sha256) == (path.stat().st_size, sha256(path))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    write_tensors(tmp_path, "empty.safetensors", [])
    assert load_file(tmp_path / "empty.safetensors") == {}


def test_tensors_are_written_through_no_link_and_over_no_file(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("link", "dangling", "elsewhere"):
        with pytest.raises(FileExistsError):
            write_tensors(tmp_path, name, [("a", torch.zeros(3))])
    assert (tmp_path / "elsewhere").read_text() == "mine" and not (tmp_path / "nothing").exists()
    assert (tmp_path / "link").is_symlink()
