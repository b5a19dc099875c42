"""Which checkpoints stay: retention, and going back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.store_folders import contents, failing, steps_in, written

from megatron_lpa.checkpoint import store
from megatron_lpa.checkpoint.store import (
    Retention,
    damaged_folders,
    has_checkpoints,
    pass_over,
    prune,
    set_aside,
    tidy,
    to_go_back_to,
)
from megatron_lpa.errors import TryAgain
from megatron_lpa.run_folder import DAMAGE_NOTE, MANIFEST, step_of

LOSSES = {100: 3.0, 200: 2.0, 300: None, 400: 2.5, 500: 2.6, 600: None}


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [100, 200, 300, 400, 500, 600]),
        (Retention(newest=2), [500, 600]),
        (Retention(newest=1, every=300), [300, 600]),
        (Retention(newest=1, best=True), [200, 600]),
        (Retention(newest=1, every=250, best=True), [200, 500, 600]),
        (Retention(newest=2, interval=400), [400, 500, 600]),
        (Retention(newest=2, interval=200), [500, 600]),
        (Retention(newest=1, interval=700), [600]),
        (Retention(newest=9), [100, 200, 300, 400, 500, 600]),
        (Retention(every=300, best=True), [100, 200, 300, 400, 500, 600]),
    ],
)
def test_what_any_rule_names_stays(tmp_path, retention, left):
    for step, loss in LOSSES.items():
        written(tmp_path, step, loss=loss)
    prune(tmp_path, retention)
    assert steps_in(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (
            Retention(newest=1, interval=5),
            [6, 8],
        ),  # the newest one that was due, whatever the interval is today
        (Retention(newest=1, interval=1), [6, 8]),
        (Retention(newest=1), [6, 8]),
        (Retention(newest=3, interval=5), [6, 7, 8]),
    ],
)
def test_the_newest_one_that_was_due_when_it_was_written_stays(tmp_path, retention, left):
    """Of checkpoints at each step up to 6; then stops at 7 and 8, with an interval of 5."""
    for step in range(1, 9):
        written(tmp_path, step, at_interval=step <= 6)
    assert [step_of(path) for path in to_go_back_to(tmp_path, retention.interval)] == [7, 8, 1, 2, 3, 4, 5, 6]
    prune(tmp_path, retention)
    assert steps_in(tmp_path) == left


def test_of_manifests_that_do_not_say_todays_interval_tells(tmp_path):
    for step in (4, 5, 6, 7, 9):
        written(tmp_path, step)
    written(tmp_path, 8, at_interval=False)
    (tmp_path / "step_00000009" / MANIFEST).write_text("{")
    assert [step_of(path) for path in to_go_back_to(tmp_path, 3)] == [4, 5, 7, 8, 6, 9]
    assert [step_of(path) for path in to_go_back_to(tmp_path, 0)] == [4, 5, 6, 7, 8, 9]


def test_a_manifest_that_the_disk_does_not_give_decides_nothing(tmp_path, monkeypatch):
    for step in (4, 5):
        written(tmp_path, step)

    def fails(path: Path, complete: bool = True) -> None:
        raise TryAgain(f"{path}: cannot be read")

    monkeypatch.setattr(store, "described", fails)
    with pytest.raises(TryAgain):
        to_go_back_to(tmp_path, 4)
    pass_over(tmp_path, 4, Retention(newest=1))  # nor is it removed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["passed_step_00000005", "step_00000004"]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), {100: "keep_checkpoints=0", 200: "keep_checkpoints=0", 300: "keep_checkpoints=0",
        400: "keep_checkpoints=0"}),
        (Retention(newest=2), {}),
        (Retention(newest=2, every=150), {300: "keep_every=150"}),
        (Retention(newest=9, best=True), {200: "keep_best"}),
        (Retention(newest=1, every=400, best=True), {200: "keep_best", 400: "keep_every=400"}),
        (Retention(newest=2, interval=100), {}),
    ],
)  # fmt: skip
def test_going_back_removes_nothing_that_a_rule_names(tmp_path, retention, kept):
    losses = {50: 3.0, 100: 2.9, 200: 2.0, 300: 2.1, 400: None}
    for step, loss in losses.items():
        written(tmp_path, step, loss=loss)
    before = {step: contents(tmp_path / f"step_{step:08d}") for step in losses}
    notes = pass_over(tmp_path, 50, retention)
    assert steps_in(tmp_path) == [50] and not damaged_folders(tmp_path)
    for step, note in zip((400, 300, 200, 100), notes, strict=True):
        passed = tmp_path / f"passed_step_{step:08d}"
        assert passed.exists() == (step in kept)
        if step in kept:
            assert contents(passed) == before[step]
            assert note.startswith(f"step_{step:08d} is now {passed.name}: ") and kept[step] in note
        else:
            assert note.startswith(f"step_{step:08d} is removed: ")
    # Nothing loads, counts or removes what was passed over, and the same step has a place for it once more.
    for step in (100, 200, 300, 400):
        written(tmp_path, step, "y", loss=losses[step])
    tidy(tmp_path)
    prune(tmp_path, Retention(newest=1))
    assert steps_in(tmp_path) == [400] and has_checkpoints(tmp_path)
    pass_over(tmp_path, 50, Retention())
    both = [f"passed_step_00000400{end}" for end in (("", ".2") if 400 in kept else ("",))]
    assert sorted(path.name for path in tmp_path.glob("passed_step_00000400*")) == both
    for step in kept:
        assert contents(tmp_path / f"passed_step_{step:08d}") == before[step]


def test_what_is_damaged_is_not_removed_by_going_back(tmp_path):
    for step in (4, 6, 7):
        written(tmp_path, step)
    (tmp_path / "step_00000006" / MANIFEST).write_text("{")
    (tmp_path / "step_00000007" / MANIFEST).unlink()
    notes = pass_over(tmp_path, 4, Retention(newest=1))
    assert all("its manifest cannot be used" in note for note in notes) and len(notes) == 2
    assert sorted(path.name for path in tmp_path.glob("passed*")) == [
        f"passed_step_0000000{n}" for n in (6, 7)
    ]


def test_what_cannot_be_got_out_of_the_way_is_said(tmp_path, monkeypatch):
    for step in (4, 6):
        written(tmp_path, step)
    monkeypatch.setattr(os, "rename", failing(os.rename, lambda *_: True))
    for retention in (Retention(), Retention(newest=1)):
        (note,) = pass_over(tmp_path, 4, retention)
        assert (
            note.startswith("step_00000006 cannot be got out of the way (") and "Input/output error" in note
        )
    assert steps_in(tmp_path) == [4, 6]


def test_damaged_ones_count_for_no_rule_and_are_not_removed(tmp_path):
    for step in (100, 200, 300, 400):
        written(tmp_path, step, loss=float(step))
    set_aside(tmp_path / "step_00000400", "a bit is wrong")
    (tmp_path / "step_00000300" / MANIFEST).write_text("{")
    prune(tmp_path, Retention(newest=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged_step_00000400",
        "step_00000200",
        "step_00000300",
    ]
    assert "a bit is wrong" in (tmp_path / "damaged_step_00000400" / DAMAGE_NOTE).read_text()
    assert (
        "rename the folder to step_00000400" in (tmp_path / "damaged_step_00000400" / DAMAGE_NOTE).read_text()
    )


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, capsys):
    for step in (1, 2, 3):
        written(tmp_path, step)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "rename", refuse)
    prune(tmp_path, Retention(newest=1))
    assert "warning: an old checkpoint cannot be removed: not yours" in capsys.readouterr().err
    assert steps_in(tmp_path) == [1, 2, 3]
