"""The checkpoints folder without any model: publication, retention, damage, and kills in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from support.manifests import whole_manifest

from megatron_lpa import files
from megatron_lpa.engine import store
from megatron_lpa.engine.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    Progress,
    checkpoint_folders,
    complete_checkpoints,
    read_manifest,
    sealed,
    step_of,
    verify_files,
)
from megatron_lpa.engine.store import (
    NOTE,
    Retention,
    check_free_space,
    damaged_folders,
    expendable,
    has_checkpoints,
    partial_of,
    pass_over,
    prune,
    publish,
    set_aside,
    tidy,
    to_go_back_to,
)
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import UnusableFile, sha256


def prepared(folder: Path, step: int, content: str, loss: float | None = None, **more: object) -> str:
    """A checkpoint of one small file under construction; returns its manifest."""
    final = folder / f"step_{step:08d}"
    partial = partial_of(final)
    store.remove(partial)
    (partial / "state").mkdir(parents=True)
    file = partial / "state" / "rank_00000.safetensors"
    file.write_text(content * 100)
    files = {"state/rank_00000.safetensors": {"bytes": len(content) * 100, "sha256": sha256(file)}}
    manifest = whole_manifest(step, files) | {"validation_loss": loss, **more}
    return json.dumps(sealed(manifest))


def written(folder: Path, step: int, content: str = "x", loss: float | None = None, **more: object) -> None:
    """A checkpoint of one small file, by way of ``publish``."""
    publish(folder / f"step_{step:08d}", prepared(folder, step, content, loss, **more))


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_checkpoints(folder)]


def verified(checkpoint: Path) -> Progress:
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest, manifest["files"])
    return manifest["progress"]


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
        (Retention(), {100: "keep_checkpoints=0", 200: "keep_checkpoints=0", 300: "keep_checkpoints=0", 400: "keep_checkpoints=0"}),
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


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["stat", "lstat", "scandir"])
def test_a_disk_that_does_not_answer_at_once_fails_no_checkpoint(tmp_path, monkeypatch, call, number):
    """Each look of a save, of retention and of a start at each path fails the first time."""
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    real = getattr(os, call)
    failed: dict[str, int] = {}

    def looks(path: object = ".", *more: object, **named: object) -> object:
        if str(path).startswith(str(tmp_path)) and failed.setdefault(str(path), 0) < 1:
            failed[str(path)] += 1
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *more, **named)

    for step in (1, 2, 3):
        written(tmp_path, step, "old")
    (tmp_path / ".step_00000009.partial").mkdir()
    manifest = prepared(tmp_path, 3, "new")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, looks)
        publish(tmp_path / "step_00000003", manifest)
        prune(tmp_path, Retention(newest=2))
        tidy(tmp_path)
    assert steps_in(tmp_path) == [2, 3] and failed
    assert (tmp_path / "step_00000003/state/rank_00000.safetensors").read_text() == "new" * 100
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


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
    assert "a bit is wrong" in (tmp_path / "damaged_step_00000400" / NOTE).read_text()
    assert "rename the folder to step_00000400" in (tmp_path / "damaged_step_00000400" / NOTE).read_text()


def test_setting_aside_twice_keeps_both(tmp_path):
    for _ in range(2):
        written(tmp_path, 7)
        set_aside(tmp_path / "step_00000007", "damaged")
    assert [p.name for p in damaged_folders(tmp_path)] == ["damaged_step_00000007", "damaged_step_00000007.2"]
    assert has_checkpoints(tmp_path) and checkpoint_folders(tmp_path) == []


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, capsys):
    for step in (1, 2, 3):
        written(tmp_path, step)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "rename", refuse)
    prune(tmp_path, Retention(newest=1))
    assert "warning: an old checkpoint cannot be removed: not yours" in capsys.readouterr().err
    assert steps_in(tmp_path) == [1, 2, 3]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_every_single_bit_of_the_manifest_is_guarded(tmp_path):
    written(tmp_path, 5)
    checkpoint = tmp_path / "step_00000005"
    assert verified(checkpoint) == Progress(5, 40, 640)
    size = (checkpoint / MANIFEST).stat().st_size
    for at in range(size):
        flip(checkpoint / MANIFEST, at)
        with pytest.raises(DamagedCheckpoint):
            verified(checkpoint)
        flip(checkpoint / MANIFEST, at)
    verified(checkpoint)


def test_other_damage_is_found(tmp_path):
    for step, content in ((5, "x"), (6, "y")):
        written(tmp_path, step, content)
    checkpoint = tmp_path / "step_00000005"
    file = checkpoint / "state" / "rank_00000.safetensors"
    sound = {path: path.read_bytes() for path in (file, checkpoint / MANIFEST)}

    def damaged(match: str) -> None:
        with pytest.raises(DamagedCheckpoint, match=match):
            verified(checkpoint)
        for path, content in sound.items():
            if path.is_dir():
                path.rmdir()
            path.write_bytes(content)
        verified(checkpoint)

    flip(file, 50)
    damaged("contents differ")
    file.write_bytes(sound[file][:-1])
    damaged("not 100 bytes long")
    file.unlink()
    damaged("missing")
    file.unlink()
    file.mkdir()
    damaged("missing")
    shutil.copy(tmp_path / "step_00000006" / "state" / "rank_00000.safetensors", file)
    damaged("contents differ")
    shutil.copy(tmp_path / "step_00000006" / MANIFEST, checkpoint / MANIFEST)
    damaged("it is the manifest of step 6")
    (checkpoint / MANIFEST).unlink()
    damaged("no such file")
    for text in ("", "[]", "null", '{"format": 1}', "\x80"):
        (checkpoint / MANIFEST).write_text(text)
        damaged("not a checkpoint manifest")


@pytest.mark.parametrize("name", ["/etc/passwd", "../../step_00000001/manifest.json", "state/../../x"])
def test_a_manifest_cannot_name_files_outside(tmp_path, name):
    written(tmp_path, 5, files={name: {"bytes": 1, "sha256": 64 * "0"}})
    with pytest.raises(DamagedCheckpoint, match="outside of the checkpoint"):
        read_manifest(tmp_path / "step_00000005")


def test_a_manifest_of_another_version_is_not_damaged(tmp_path):
    written(tmp_path, 5, format=7)
    with pytest.raises(UserError, match="format 7; this version reads 1") as raised:
        read_manifest(tmp_path / "step_00000005")
    assert not isinstance(raised.value, DamagedCheckpoint)


def test_too_little_space_is_said_with_both_sizes(tmp_path):
    check_free_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"a checkpoint takes 1,000,000,000\.0 GB but [\d.,]+ [GM]B are free"):
        check_free_space(tmp_path, 10**18)


class Killed(BaseException):
    """The process ends here."""


CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "open")


def test_a_kill_between_any_two_operations_loses_nothing_that_was_complete(tmp_path, monkeypatch):
    """Saving with retention over an older one of the same step: the newest complete one is always whole."""
    real = {name: getattr(os, name) for name in CALLS}
    finished = False
    for last_call in range(1000):
        folder = tmp_path / str(last_call)
        for step in (1, 2, 3):
            written(folder, step, "old")
        calls = 0

        def counted(name: str):
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls > last_call:  # noqa: B023
                    raise Killed
                return real[name](*arguments, **options)

            return call

        with monkeypatch.context() as patched:
            for name in CALLS:
                patched.setattr(os, name, counted(name))
            try:
                written(folder, 3, "new")
                prune(folder, Retention(newest=2))
                finished = True
            except Killed:
                pass
        tidy(folder)
        newest = complete_checkpoints(folder)[-1]
        assert verified(newest) == Progress(3, 24, 384), last_call
        assert checkpoint_folders(folder) == complete_checkpoints(folder)
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        for path in complete_checkpoints(folder):
            verified(path)
        assert expendable(folder, Retention(newest=2)) in ([folder / "step_00000001"], [])
        if finished:
            break
    assert finished and last_call > 15


def failing(real, when):
    """The function, which fails where ``when`` says so of its arguments."""

    def call(*arguments, **options):
        if when(*arguments):
            raise OSError(5, "Input/output error")
        return real(*arguments, **options)

    return call


def test_a_checkpoint_that_has_its_name_is_there_whatever_fails_then(tmp_path, monkeypatch, capsys):
    written(tmp_path, 3, "old")
    with monkeypatch.context() as patched:
        sync = failing(store.fsync_folder, lambda folder: Path(folder) == tmp_path)
        patched.setattr(store, "fsync_folder", sync)
        written(tmp_path, 3, "new")
    assert "warning: " in capsys.readouterr().err
    assert (tmp_path / "step_00000003/state/rank_00000.safetensors").read_text() == "new" * 100
    verified(tmp_path / "step_00000003")
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_one_that_does_not_get_its_name_leaves_it_to_the_older_one(tmp_path, monkeypatch):
    written(tmp_path, 3, "old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing(os.rename, lambda a, b: Path(a).name.endswith(".partial")))
        with pytest.raises(OSError, match="Input/output error"):
            written(tmp_path, 3, "new")
    assert verified(tmp_path / "step_00000003") == Progress(3, 24, 384)
    assert (tmp_path / "step_00000003/state/rank_00000.safetensors").read_text() == "old" * 100


def test_what_a_killed_process_left_and_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, capsys):
    written(tmp_path, 3)
    (tmp_path / ".step_00000004.partial").mkdir()
    (tmp_path / ".step_00000003.removed").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", failing(shutil.rmtree, lambda path: "partial" in str(path)))
        tidy(tmp_path)
    assert "warning: what a killed process left cannot be removed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_00000004.partial", "step_00000003"]
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_full_disk_does_not_keep_a_damaged_one_from_being_set_aside(tmp_path, monkeypatch):
    written(tmp_path, 3)
    monkeypatch.setattr(store, "write_durably", failing(store.write_durably, lambda *_: True))
    assert set_aside(tmp_path / "step_00000003", "a bit is wrong").name == "damaged_step_00000003"
    assert [path.name for path in tmp_path.iterdir()] == ["damaged_step_00000003"]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """What links of a run lead to: it must stay as it is."""
    folder = tmp_path / "mine"
    for step in (1, 2):
        written(folder, step)
    (folder / "note").write_text("mine")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_links_lead_to_is_never_removed_or_written(tmp_path, mine):
    before = contents(mine)
    run = tmp_path / "run"
    for step in (1, 2, 3, 4):
        written(run, step)
    for name in (".step_00000007.partial", ".step_00000001.removed", ".step_00000003.replaced"):
        (run / name).symlink_to(mine)
    (run / "step_00000000").symlink_to(mine / "step_00000001")
    (run / "step_00000004" / NOTE).symlink_to(mine / "note")
    written(run, 7)  # over a link to a folder, where it is to be written
    tidy(run)
    prune(run, Retention(newest=2))
    aside = set_aside(run / "step_00000004", "a bit is wrong")
    assert "a bit is wrong" in (aside / NOTE).read_text() and not (aside / NOTE).is_symlink()
    assert contents(mine) == before
    assert sorted(path.name for path in run.iterdir()) == [
        "damaged_step_00000004", "step_00000000", "step_00000007",
    ]  # fmt: skip


def test_a_linked_folder_or_checkpoint_is_left_alone(tmp_path, mine, capsys):
    before = contents(mine)
    linked = tmp_path / "checkpoints"
    linked.symlink_to(mine)
    prune(linked, Retention(newest=1))
    assert f"{linked}: a link, and nothing behind it is changed" in capsys.readouterr().err
    for change in (
        lambda: tidy(linked),
        lambda: set_aside(linked / "step_00000002", "a bit is wrong"),
        lambda: pass_over(linked, 1, Retention()),
    ):
        with pytest.raises(UnusableFile, match="a link, and nothing behind it is changed"):
            change()
    (mine / "step_00000003").symlink_to("step_00000002")
    with pytest.raises(UnusableFile, match="a link"):
        set_aside(mine / "step_00000003", "a bit is wrong")
    assert expendable(mine, Retention(newest=1)) == [mine / "step_00000001"]
    (mine / "step_00000003").unlink()
    assert contents(mine) == before
