"""Safetensors files read by system calls, against the safetensors library; strangers' files; disks that
hiccup."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import State, convert_in, manifest_of, random_checkpoint
from support.manifests import put
from support.models import MODELS

from megatron_lpa import files
from megatron_lpa.checkpoint import tensor_reader
from megatron_lpa.checkpoint.convert_source import find_source
from megatron_lpa.checkpoint.manifest import DamagedCheckpoint, read_manifest
from megatron_lpa.checkpoint.tensor_file import INDEX, SINGLE
from megatron_lpa.checkpoint.tensor_reader import TensorFiles
from megatron_lpa.checkpoint.weights import load_decoder
from megatron_lpa.errors import EXIT_FAILED, TryAgain, UserError

MODEL = MODELS["s1_low_all"]
NAME = "step_00000007"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))


def test_every_tensor_and_any_range_of_it_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "f": torch.randn(5, 7), "h": torch.randn(3, 2, 4).half(), "b": torch.randn(9).bfloat16(),
        "d": torch.randn(2, 2).double(),
        "scalar": torch.tensor(1.5), "none": torch.zeros(0, 4),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})
    reader, expected = TensorFiles(), load_file(path)
    found = reader.header(path)
    assert found.keys() == expected.keys()
    for name, stored in found.items():
        value = reader.read(path, stored)
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    draw = random.Random(0)
    for _ in range(20):
        start, end = sorted(draw.choices(range(36), k=2))
        part = torch.empty(end - start)
        reader.read_into(path, found["f"].offset + 4 * start, part)
        assert torch.equal(part, expected["f"].view(-1)[start:end])


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**change: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}}


F8 = b"\0" * 8
BAD = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header of 2^62 bytes": raw({}, length=1 << 62),
    "a header of 2^64 - 1 bytes": raw({}, length=(1 << 64) - 1),
    "a header that is longer than the file": raw({}, length=3),
    "no JSON": raw(b"{a"),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "deeply nested": raw(b'{"a": ' * 50_000),
    "a list": raw([]),
    "a number": raw(b"7"),
    "a number of many digits": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "a tensor that is a list": raw({"a": []}),
    "an unknown dtype": raw(one(dtype="F33"), F8),
    "a dtype that is a list": raw(one(dtype=["F32"]), F8),
    "no dtype": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, F8),
    "a negative shape": raw(one(shape=[-2]), F8),
    "a shape of text": raw(one(shape="2"), F8),
    "no shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, F8),
    "a shape that overflows": raw(one(shape=[1 << 62, 1 << 62]), F8),
    "a shape of fractions": raw(one(shape=[2.0]), F8),
    "offsets that go back": raw(one(data_offsets=[8, 0]), F8),
    "offsets behind the end": raw(one(shape=[4], data_offsets=[0, 16]), F8),
    "offsets that do not fit": raw(one(data_offsets=[0, 4]), F8[:4]),
    "one offset": raw(one(data_offsets=[8]), F8),
    "a gap": raw(one(data_offsets=[8, 16]), F8 * 2),
    "an overlap": raw({**one(), "b": one()["a"]}, F8),
    "bytes that are no tensor's": raw(one(), F8 * 2),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_lies_is_damage_in_one_short_line_and_the_library_refuses_it_too(
    tmp_path: Path, what: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BAD[what])
    with pytest.raises(SafetensorError), safe_open(path, framework="pt") as file:
        file.keys()
    with pytest.raises(DamagedCheckpoint, match=r"x\.safetensors: not a safetensors file: ") as told:
        TensorFiles().header(path)
    assert len(str(told.value)) < 300 + len(str(path)) and "\n" not in str(told.value)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link_out(path: Path) -> None:
    elsewhere = path.parents[2] / f"elsewhere {path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put_there", [pipe, link_out, folder])
@pytest.mark.parametrize(
    "name", ["state/rank_00001.safetensors", "weights/model.safetensors", "manifest.json"]
)
def test_only_regular_files_of_the_folder_are_read(
    tmp_path: Path, put_there: Callable[[Path], None], name: str
) -> None:
    random_checkpoint(tmp_path / "c", MODEL)
    checkpoint = tmp_path / "c" / NAME
    put_there(checkpoint / name)
    with pytest.raises(DamagedCheckpoint, match=name):
        find_source(checkpoint)
    if not name.startswith("state"):
        with pytest.raises(DamagedCheckpoint, match=name):
            read_manifest(checkpoint, under="weights/")


def test_a_folder_of_files_that_is_a_link_is_not_gone_through(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "c", MODEL)
    (tmp_path / "c" / NAME / "state").rename(tmp_path / "elsewhere")
    (tmp_path / "c" / NAME / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="state: a link, which may lead out of the checkpoint"):
        find_source(tmp_path / "c" / NAME)


INDICES: list[Any] = [
    None, [], "x", 7, {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}},
    {"weight_map": {"a": None}},
    {"weight_map": {"a": ["part.safetensors"]}}, {"weight_map": {"a": 1}},
    {"weight_map": {"a": "../part.safetensors"}},
    {"weight_map": {"a": "/tmp/part.safetensors"}}, {"weight_map": {"a": "sub/part.safetensors"}},
    {"weight_map": {"a": ""}},
    {"weight_map": {"a": "part\0.safetensors"}}, {"weight_map": {"a": "part.safetensors", "b": "..",
    "c": "."}},
    {"weight_map": {"a": "gone.safetensors"}}, {"weight_map": {"a": "pipe.safetensors"}},
    {"weight_map": {"a": "link.safetensors"}},
    {"weight_map": {"a": "x" * 100_000}}, {"weight_map": {"a": "part.bin"}},
    {"weight_map": {"a": "\ud800.safetensors"}},
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", INDICES, ids=lambda content: repr(content)[:50])
def test_an_index_leads_nowhere_else(tmp_path: Path, content: Any) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for place in (weights / "part.safetensors", tmp_path / "part.safetensors"):
        save_file({"a": torch.zeros(1)}, place)
    os.mkfifo(weights / "pipe.safetensors")
    (weights / "link.safetensors").symlink_to("../part.safetensors")
    (weights / INDEX).write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors\.index\.json: damaged: ") as told:
        load_decoder(weights, MODEL)
    assert len(str(told.value)) < 300 + len(str(weights)) and "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"weight_map": ' + "9" * 5000 + "}"], ids=len)
def test_an_index_that_is_no_json_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"index\.json.*: not valid JSON"):
        load_decoder(tmp_path, MODEL)


def test_weights_that_no_hash_was_compared_with_are_not_read(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, MODEL)
    weights = tmp_path / NAME / "weights"
    load_decoder(weights, MODEL, listed={SINGLE})
    shutil.copy(weights / SINGLE, weights / "part.safetensors")
    (weights / INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with pytest.raises(DamagedCheckpoint, match=r"names 'part\.safetensors', which is no file of this"):
        load_decoder(weights, MODEL, listed={INDEX})
    load_decoder(weights, MODEL, listed={INDEX, "part.safetensors"})
    with pytest.raises(UserError, match="no weights here"):
        load_decoder(weights, MODEL, listed=set())


class Hiccup:
    """Lets a system call fail ``times`` times, from its ``after``-th call for a file of this name on."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int, after: int
    ) -> None:
        self.left, self._after, opened = times, after, {}
        real_open, real_read = os.open, os.preadv

        def fail() -> None:
            self._after -= 1
            if self._after < 0 and self.left:
                self.left -= 1
                raise OSError(number, os.strerror(number))

        def open_(path: Any, *arguments: Any, **options: Any) -> int:
            mine = not isinstance(path, int) and os.fspath(path).endswith(name)
            if mine:
                fail()
            descriptor = real_open(path, *arguments, **options)
            opened[descriptor] = mine
            return descriptor

        def preadv(descriptor: int, *arguments: Any) -> int:
            if opened.get(descriptor):
                fail()
            return real_read(descriptor, *arguments)

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("after", range(6))  # the hash, the header's opening and reads, then the tensors
@pytest.mark.parametrize("file", ["state/rank_00001.safetensors", "weights/model.safetensors"])
def test_a_disk_that_hiccups_is_asked_again_and_one_that_fails_is_no_damage(
    tmp_path: Path, saved: tuple[Path, State], monkeypatch: pytest.MonkeyPatch, no_pauses: None, number: int, after: int, file: str  # noqa: E501
) -> None:  # fmt: skip
    run, state = saved
    weights = run / "checkpoints" / NAME / "weights"

    def use() -> None:
        if file.startswith("state"):
            convert_in(run, tmp_path / "o" / NAME)
        else:
            find_source(run)
            decoder = load_decoder(weights, MODEL)
            for name, parameter in decoder.named_parameters():
                assert torch.equal(parameter, state[name, "master"].bfloat16().float()), name

    with monkeypatch.context() as patched:
        failing = Hiccup(patched, file, number, 3, after)
        use()
    assert failing.left == 0
    shutil.rmtree(tmp_path / "o", ignore_errors=True)
    with monkeypatch.context() as patched:
        Hiccup(patched, file, number, 10**6, after)
        with pytest.raises(TryAgain, match=rf"{file}: cannot be read .* at 4 attempts") as told:
            use()
    assert told.value.exit_code == EXIT_FAILED and not (tmp_path / "o" / NAME).exists()


def test_a_file_that_became_shorter_or_went_away_is_told_by_name(tmp_path: Path, no_pauses: None) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    reader = TensorFiles()
    stored = reader.header(path)["a"]
    os.truncate(path, 2000)
    with pytest.raises(TryAgain, match=r"x\.safetensors: cannot be read \(the file ends at byte 2000\)"):
        reader.read(path, stored)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"x\.safetensors: no such file"):
        reader.read(path, stored)


def test_reads_that_give_less_go_on_and_few_files_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = random_checkpoint(tmp_path, MODEL, files=9)
    real = os.preadv

    def little(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", little)
    monkeypatch.setattr(tensor_reader, "MOST_OPEN", 3)
    source = find_source(tmp_path / NAME)

    before = len(os.listdir("/proc/self/fd"))
    reader = source.open_state()
    for parameter in source.parameters("latent"):
        for kind in source.kinds:
            assert torch.equal(reader.whole(parameter, kind), state[parameter.name, kind])
            assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_permissions_are_no_damage_here(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, MODEL)
    (tmp_path / NAME / "weights" / SINGLE).chmod(0)
    with pytest.raises(UserError, match="change its permissions") as told:
        find_source(tmp_path / NAME)
    assert not isinstance(told.value, DamagedCheckpoint)


def test_a_missing_permission_stops_and_takes_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        random_checkpoint(tmp_path / "checkpoints", MODEL, step)
    real = os.open

    def refused(path: Any, *arguments: Any, **options: Any) -> int:
        if "step_00000002/state" in os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UserError, match=r"Permission denied; change its permissions") as told:
        find_source(tmp_path)
    assert not isinstance(told.value, (DamagedCheckpoint, TryAgain))


def test_a_state_of_whole_tensors_or_another_precision_is_no_file_of_fragments(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, MODEL)
    checkpoint = tmp_path / NAME
    path, sound = checkpoint / "state/rank_00000.safetensors", manifest_of(checkpoint)
    for key, value in (
        ("a/master/whole/0", torch.zeros(2, 2)), ("a/master/whole/0", torch.zeros(2).half()), ("a",
        torch.zeros(2)),
        ("a/master/whole/-1", torch.zeros(2)), ("a/master/whole/" + "9" * 5000, torch.zeros(2)),
        ("a/b/c/\u0660", torch.zeros(1)),
    ):  # fmt: skip
        save_file({key: value}, path)
        described = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        put(checkpoint, {**sound, "files": {**sound["files"], "state/rank_00000.safetensors": described}})
        with pytest.raises(DamagedCheckpoint, match="not a file of fragments") as told:
            convert_in(checkpoint, tmp_path / "o")
        assert len(str(told.value)) < 400
