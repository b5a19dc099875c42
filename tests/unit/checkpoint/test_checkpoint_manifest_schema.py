"""Sealed manifests that say what cannot be: damage, told in one short line, whatever the key and the
value."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import manifest_of, random_checkpoint
from support.manifests import put, small_checkpoint, whole_manifest
from support.models import MODELS

from megatron_lpa.checkpoint.convert import TargetLayout, convert
from megatron_lpa.checkpoint.convert_source import find_source
from megatron_lpa.checkpoint.manifest import (
    DamagedCheckpoint,
    note_validation,
    read_manifest,
    seal_of,
    verify_files,
)
from megatron_lpa.checkpoint.manifest_schema import check_manifest
from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.checkpoint.store import Retention, expendable, prune
from megatron_lpa.errors import UserError
from megatron_lpa.run_folder import MANIFEST

MISSING = object()
WRONG: list[Any] = [MISSING, None, [], {}, [1], {"a": 1}, True, False, -1, 0, 1.5, 10**30, 10**400, float("nan"), float("inf"), "", "7", "x" * 10**6, "\0"]  # fmt: skip  # noqa: E501

FREE = {  # what a key may hold although it is in the list above
    ("format",): [],
    ("validation_loss",): [MISSING, None, -1, 0, 1.5, 10**30],
    ("progress", "skipped_samples"): [MISSING, 0],
    ("order", "seed"): [-1, 0],
    ("model",): [{}, {"a": 1}],
    ("versions", "deepspeed"): ["7"],
    ("order", "data"): [{}, {"a": 1}],
    ("state", "parameters"): [{}],
    ("files",): [{}],
}
ZERO_IS_FINE = [
    ("progress", "step"), ("progress", "consumed_samples"), ("progress", "consumed_tokens"),
    ("order", "samples_per_epoch"), ("order", "samples_per_step"), ("layout", "zero_stage"),
    ("state", "optimizer_step"), ("state", "skipped_steps"), ("files", "state/x", "bytes"),
]  # fmt: skip
NOT_READ = [
    ("versions", "megatron_lpa"), ("versions", "torch"), ("versions", "safetensors"), ("state", "optimizer"),
    ("order", "data", "hash"),
]  # fmt: skip


def places(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every member of nested dictionaries and lists."""
    members = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in members:
        yield (*above, key)
        if isinstance(member, (dict, list)):
            yield from places(member, (*above, key))


def changed(manifest: dict[str, Any], place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    made: Any = copy.deepcopy(manifest)
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return made


def allowed(place: tuple[str | int, ...], value: Any) -> bool:
    """Whether the value can be meant: by the tables above, and by the types of settings for a model."""
    if value is MISSING and place[0] == "model" and len(place) > 1:
        return True  # a setting that another version does not know is a difference, not damage
    if place[0] == "model" and len(place) > 1:
        kinds: dict[str | int, list[Any]] = {
            "vocab_size": [0, -1], "dropout": [-1, 0, 1.5, 10**30], "num_kv_heads": [None, 0, -1],
            "rank": [None, 0, -1],
            "tie_embeddings": [True, False], "norm": ["7"], "kind": ["7"], "projections": [{}, {"a": 1}],
            "q": [{}, {"a": 1}],
        }  # fmt: skip
        return any(
            value is fine or (type(value) is type(fine) and value == fine) for fine in kinds[place[-1]]
        )
    if place in ZERO_IS_FINE and type(value) is int and value == 0:
        return place != ("progress", "step") and place != ("files", "state/x", "bytes")
    if place == ("state", "parameters", "a.w", "tp_dim"):
        return value is None or (type(value) is int and value == 0)
    if place == ("state", "parameters", "a.w", "shape"):
        return False
    return any(value is fine or (type(value) is type(fine) and value == fine) for fine in FREE.get(place, []))


def cases() -> list[tuple[str, tuple[str | int, ...], Any]]:
    files = {"state/x": {"bytes": 10, "sha256": 64 * "0"}}
    found = []
    for place in places(whole_manifest(3, files)):
        if place in NOT_READ:
            continue
        for value in WRONG:
            if value is MISSING and isinstance(place[-1], int):
                continue
            if place[-1] == "a.w" and value is MISSING:
                continue
            if place[-1] == "state/x" and value is MISSING:
                continue
            if not allowed(place, value):
                words = "missing" if value is MISSING else repr(value)[:20]
                found.append((f"{'.'.join(map(str, place))}={words}", place, value))
    return found


CASES = cases()


def test_there_are_cases_of_every_section() -> None:
    assert {place[0] for _, place, _ in CASES} == set(whole_manifest(3, {}))
    assert len(CASES) > 500


def test_a_manifest_that_says_what_cannot_be_is_damage_in_one_short_line(tmp_path: Path) -> None:
    """All in one test: each takes a millisecond."""
    sound = small_checkpoint(tmp_path, 3)
    checkpoint = tmp_path / "step_00000003"
    assert read_manifest(checkpoint)["progress"] == Progress(3, 24, 384)
    problems = []
    for words, place, value in CASES:
        put(checkpoint, changed(sound, place, value))
        try:
            read_manifest(checkpoint)
            problems.append(f"{words}: accepted")
        except DamagedCheckpoint as error:
            line = str(error)
            if "\n" in line or len(line) > 300 + 3 * len(str(checkpoint)) or str(checkpoint) not in line:
                problems.append(f"{words}: {line[:400]}")
        except BaseException as error:
            problems.append(f"{words}: {type(error).__name__}: {str(error)[:200]}")
    assert problems == []


@pytest.mark.parametrize(
    "place",
    [
        ("progress", "step"), ("progress", "consumed_samples"), ("progress", "consumed_tokens"),
        ("progress", "skipped_samples"), ("state", "optimizer_step"), ("state", "skipped_steps"),
    ],
)  # fmt: skip
def test_a_count_that_is_accepted_can_go_on_for_the_length_of_a_run(place: tuple[str, str]) -> None:
    sound = whole_manifest(3, {})
    for value in (2**53, 2**53 + 256, 2**53 + 10**15, 2**60):
        check_manifest(changed(sound, place, value), complete=True)
    with pytest.raises(ValueError, match=place[-1]):
        check_manifest(changed(sound, place, 2**60 + 1), complete=True)


@pytest.mark.parametrize("value", [None, [], {}, True, 0.5, float("nan"), "1"])
def test_no_number_is_no_other_format(tmp_path: Path, value: Any) -> None:
    sound = small_checkpoint(tmp_path, 3)
    for place in (("format",), ("state", "format")):
        put(tmp_path / "step_00000003", changed(sound, place, value))
        with pytest.raises(DamagedCheckpoint, match="format"):
            read_manifest(tmp_path / "step_00000003")


def test_other_formats_are_refused_whatever_else_they_say(tmp_path: Path) -> None:
    sound = small_checkpoint(tmp_path, 3)
    for change in ({"format": 2, "files": []}, {"state": {"format": 2, "tensors": 7}}):
        put(tmp_path / "step_00000003", {**sound, **change})
        with pytest.raises(UserError, match=r"format 2; this version reads 1") as told:
            read_manifest(tmp_path / "step_00000003")
        assert not isinstance(told.value, DamagedCheckpoint)


FILE = {"bytes": 10, "sha256": 64 * "0"}


@pytest.mark.parametrize(
    "change",
    [
        {"files": {name: FILE}}
        for name in (
            "/etc/passwd", "../x", "state/../x", "state/..", "state/.", "state//x", "state/./x", "./state/x",
            "state/x/y",
            "state", "state/", "", "manifest.json", "other/x", "weights/a\0b", "weights/a\nb",
            "state/" + 300 * "x",
            "weights/\ud800", "state/\u0660",
        )
    ]
    + [
        {"state": {"format": 1, "optimizer_step": 3, "skipped_steps": 0, "parameters": {"a": parameter}}}
        for parameter in (
            {"shape": [3, 12], "tp_dim": 0}, {"shape": [8], "tp_dim": 1}, {"shape": [1 << 30, 1 << 30],
            "tp_dim": None},
            {"shape": 17 * [1], "tp_dim": None}, {"shape": [0], "tp_dim": None}, {"shape": [True, 4],
            "tp_dim": None},
            {"shape": [8, 12], "tp_dim": 2}, {"shape": [2, 3, 8], "tp_dim": 1}, {"shape": [], "tp_dim": 0},
        )
    ]
    + [
        {"layout": {**whole_manifest(3, {})["layout"], "tensor_parallel_size": size, "data_parallel_size": other}}  # noqa: E501
        for size, other in ((10**9, 1), (1 << 17, 2), (3, 1))
    ],
    ids=lambda change: repr(change)[:60],
)  # fmt: skip
def test_names_shapes_and_layouts_fit_what_they_are_for(tmp_path: Path, change: dict[str, Any]) -> None:
    sound = small_checkpoint(tmp_path, 3)
    put(tmp_path / "step_00000003", {**sound, **change})
    started = time.monotonic()
    with pytest.raises(DamagedCheckpoint):
        read_manifest(tmp_path / "step_00000003")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "7", "{", '"x"', "[" * 100_000, '{"a": ' * 100_000,
        '{"format": ' + "9" * 5000 + "}", "{}" + "x" * 10_000,
        '{"checksum": NaN, "format": 1}',
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_what_is_no_manifest_at_all_is_told_without_its_contents(tmp_path: Path, text: str) -> None:
    small_checkpoint(tmp_path, 3)
    path = tmp_path / "step_00000003" / MANIFEST
    path.write_text(text)
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint manifest") as told:
        read_manifest(path.parent)
    assert len(str(told.value)) < 200 + 3 * len(str(path)) and "\n" not in str(told.value)


def test_what_earlier_versions_did_not_write_has_defaults_and_what_later_ones_do_is_kept(
    tmp_path: Path,
) -> None:
    sound = small_checkpoint(tmp_path, 3)
    del sound["validation_loss"], sound["progress"]["skipped_samples"]
    sound["progress"]["later"] = "x"
    decisions = {"losses": [1.5], "of a later version": [None]}
    put(tmp_path / "step_00000003", {**sound, "decisions": decisions})
    found = read_manifest(tmp_path / "step_00000003")
    assert found["progress"] == Progress(3, 24, 384, 0) and found["validation_loss"] is None
    assert found["decisions"] == decisions and "at_interval" not in found


WRONG_DECISIONS: list[dict[str, Any]] = [
    {"decisions": value} for value in (None, [], "x", 7, {"losses": None}, {"losses": {}}, {"losses": [1.5,
    None]},
    {"losses": [float("nan")]}, {"losses": [True]}, {"losses": [1e300]}, {"losses": ["x" * 10**6]},
    {"rollbacks": -1}, {"rollbacks": True}, {"rollbacks": 1.0}, {"rollbacks": 10**30},
    {"skipped_in_a_row": None}, {"skipped_in_a_row": "7"})
] + [
    {"unrecorded": value} for value in (None, [], {}, {"steps": 2, "finite": 1}, {"steps": 2, "finite": 3,
    "loss_sum": 1.0},
    {"steps": -1, "finite": 0, "loss_sum": 1.0}, {"steps": 2, "finite": 1, "loss_sum": float("inf")},
    {"steps": 2, "finite": 1, "loss_sum": 10**400}, {"steps": 2.0, "finite": 1, "loss_sum": 1.0},
    {"steps": 2, "finite": True, "loss_sum": 1.0}, {"steps": 2, "finite": 1, "loss_sum": "1"})
] + [{"at_interval": value} for value in (None, 0, 1, "true", [], "x" * 10**6)]  # fmt: skip


@pytest.mark.parametrize("change", WRONG_DECISIONS, ids=lambda change: repr(change)[:60])
def test_what_decides_is_checked_by_all_that_read_a_manifest(tmp_path: Path, change: dict[str, Any]) -> None:
    """Not by resuming alone: such a checkpoint counts for no rule, and no conversion writes it on."""
    sound = small_checkpoint(tmp_path / "checkpoints", 3)
    small_checkpoint(tmp_path / "checkpoints", 2)
    checkpoint = tmp_path / "checkpoints/step_00000003"
    put(checkpoint, {**sound, **change})
    with pytest.raises(DamagedCheckpoint, match=next(iter(change))) as told:
        read_manifest(checkpoint)
    assert "\n" not in str(told.value) and len(str(told.value)) < 250 + 3 * len(str(checkpoint))
    assert find_source(tmp_path).progress.step == 2
    assert expendable(tmp_path / "checkpoints", Retention(newest=1)) == []


def test_weights_can_be_used_with_less(tmp_path: Path) -> None:
    """Models that were taken along without their state, or written before the manifest was sealed."""
    sound = small_checkpoint(tmp_path, 3)
    path = tmp_path / "step_00000003" / MANIFEST
    less = {key: sound[key] for key in ("format", "progress", "files")}
    path.write_text(json.dumps(less))
    assert read_manifest(path.parent, under="weights/")["progress"].step == 3
    for change in (
        {"files": {"weights/../../x": FILE}},
        {"layout": {"tensor_parallel_size": "2"}},
        {"progress": {}},
    ):
        path.write_text(json.dumps({**less, **change}))
        with pytest.raises(DamagedCheckpoint):
            read_manifest(path.parent, under="weights/")


def test_what_conversions_and_saves_write_today_is_read_and_kept(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "run/checkpoints", MODELS["tied_gelu_padded"])
    convert(find_source(tmp_path / "run"), tmp_path / "step_00000007", TargetLayout(1, 2, "column_row"))
    for checkpoint in (tmp_path / "run/checkpoints/step_00000007", tmp_path / "step_00000007"):
        found, written = read_manifest(checkpoint), manifest_of(checkpoint)
        verify_files(checkpoint, found, found["files"])
        assert {**found, "progress": None} == {**written, "progress": None}
    prune(tmp_path / "run/checkpoints", Retention(newest=1))
    assert (tmp_path / "run/checkpoints/step_00000007").is_dir()


def test_a_sealed_lie_is_passed_over_by_a_conversion_and_counts_for_no_rule(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        random_checkpoint(folder, MODELS["s1_low_all"], step)
    for place, value in (
        (("files", "state/rank_00001.safetensors", "bytes"), float("inf")),
        (("state", "parameters"), None),
        (("layout", "data_parallel_size"), -1),
    ):
        original = (folder / "step_00000003" / MANIFEST).read_text()
        put(folder / "step_00000003", changed(manifest_of(folder / "step_00000003"), place, value))
        found = find_source(tmp_path)
        assert found.progress.step == 2 and len(found.notes) == 1 and len(found.notes[0]) < 600
        prune(folder, Retention(newest=2))
        assert sorted(path.name for path in folder.iterdir()) == [f"step_0000000{n}" for n in (1, 2, 3)]
        (folder / "step_00000003" / MANIFEST).write_text(original)


def test_a_model_too_large_to_build_is_refused_at_once(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, MODELS["s1_low_all"])
    sound = manifest_of(tmp_path / "step_00000007")
    started = time.monotonic()
    for setting, value in (
        ("num_layers", 1 << 39),
        ("hidden_size", 1 << 39),
        ("num_heads", 0),
        ("norm", "x"),
    ):
        put(tmp_path / "step_00000007", changed(sound, ("model", setting), value))
        with pytest.raises(UserError, match="convert with the version that wrote it") as told:
            convert(find_source(tmp_path / "step_00000007"), tmp_path / "o", TargetLayout(1, 1, "column_row"))
        assert "\n" not in str(told.value) and len(str(told.value)) < 600
    assert time.monotonic() - started < 20 and not os.path.lexists(tmp_path / "o")


def test_a_validation_that_is_made_up_is_noted_once_and_the_seal_stays(tmp_path: Path) -> None:
    sound = small_checkpoint(tmp_path, 3)
    checkpoint = tmp_path / "step_00000003"
    put(checkpoint, {**sound, "validation_loss": None})
    before = read_manifest(checkpoint)
    for loss in (2.5, 7.0):
        note_validation(checkpoint, loss)
        after = read_manifest(checkpoint)
        assert after["validation_loss"] == 2.5 and seal_of(after) == seal_of(before)
        assert after["checksum"] != before["checksum"]
        assert {k: v for k, v in after.items() if k not in ("validation_loss", "checksum")} == {
            k: v for k, v in before.items() if k not in ("validation_loss", "checksum")
        }
    assert seal_of({**after, "order": {}}) != seal_of(after)
