"""The checkpoints folder without any model: publication, retention, damage, and kills in between."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from support.hiccups import first_looks_fail
from support.store_folders import contents, failing, prepared, steps_in, written

from megatron_lpa.checkpoint import store
from megatron_lpa.checkpoint.manifest import (
    DamagedCheckpoint,
    checkpoint_folders,
    complete_checkpoints,
    read_manifest,
    verify_files,
)
from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.checkpoint.store import (
    Retention,
    check_free_space,
    damaged_folders,
    expendable,
    has_checkpoints,
    pass_over,
    prune,
    publish,
    set_aside,
    tidy,
)
from megatron_lpa.errors import UserError
from megatron_lpa.files import UnusableFile
from megatron_lpa.run_folder import DAMAGE_NOTE, MANIFEST


def verified(checkpoint: Path) -> Progress:
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest, manifest["files"])
    return manifest["progress"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["stat", "lstat", "scandir"])
def test_a_disk_that_does_not_answer_at_once_fails_no_checkpoint(tmp_path, monkeypatch, call, number):
    """Each look of a save, of retention and of a start at each path fails the first time."""
    for step in (1, 2, 3):
        written(tmp_path, step, "old")
    (tmp_path / ".step_00000009.partial").mkdir()
    manifest = prepared(tmp_path, 3, "new")
    with monkeypatch.context() as patched:
        failed = first_looks_fail(patched, tmp_path, number, (call,))
        publish(tmp_path / "step_00000003", manifest)
        prune(tmp_path, Retention(newest=2))
        tidy(tmp_path)
    assert steps_in(tmp_path) == [2, 3] and failed
    assert (tmp_path / "step_00000003/state/rank_00000.safetensors").read_text() == "new" * 100
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_setting_aside_twice_keeps_both(tmp_path):
    for _ in range(2):
        written(tmp_path, 7)
        set_aside(tmp_path / "step_00000007", "damaged")
    assert [p.name for p in damaged_folders(tmp_path)] == ["damaged_step_00000007", "damaged_step_00000007.2"]
    assert has_checkpoints(tmp_path) and checkpoint_folders(tmp_path) == []


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
    monkeypatch.setattr(store, "write_whole", failing(store.write_whole, lambda *_: True))
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


def test_what_links_lead_to_is_never_removed_or_written(tmp_path, mine):
    before = contents(mine)
    run = tmp_path / "run"
    for step in (1, 2, 3, 4):
        written(run, step)
    for name in (".step_00000007.partial", ".step_00000001.removed", ".step_00000003.replaced"):
        (run / name).symlink_to(mine)
    (run / "step_00000000").symlink_to(mine / "step_00000001")
    (run / "step_00000004" / DAMAGE_NOTE).symlink_to(mine / "note")
    written(run, 7)  # over a link to a folder, where it is to be written
    tidy(run)
    prune(run, Retention(newest=2))
    aside = set_aside(run / "step_00000004", "a bit is wrong")
    assert "a bit is wrong" in (aside / DAMAGE_NOTE).read_text() and not (aside / DAMAGE_NOTE).is_symlink()
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
