"""What of a run folder may be a link: nothing inside it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa import files, run_folder
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.run_folder import refuse_links

FOLDERS = [
    "checkpoints", "checkpoints/step_00000010", "checkpoints/.step_00000010.partial",
    "checkpoints/.step_00000010.removed",
    "checkpoints/.step_00000010.replaced", "checkpoints/damaged_step_00000010",
    "checkpoints/passed_step_00000010", "logs", "logs/hang", "logs/77.0", ".snapshot.7.1", "tokenizer",
    "tensorboard", "wandb", ".wandb", "snapshot",
]  # fmt: skip
FILES = [
    ".lock", "metrics.jsonl", ".metrics.jsonl.partial", "metrics.damaged.jsonl", "metrics.damaged.2.jsonl",
    "config.yaml",
    "wandb_id", "tokenizer/tokenizer.json", "tokenizer/any.tiktoken", "checkpoints/passed_over.json",
    "checkpoints/step_00000010/DAMAGED.txt", "tensorboard/events.out.tfevents.1", "logs/hang/rank_00000.json",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that has everything."""
    run = tmp_path / "run"
    for name in FOLDERS:
        (run / name).mkdir(parents=True)
    for name in FILES:
        (run / name).write_text("own")
    return run


def remove(path: Path) -> None:
    if path.is_dir():
        path.rename(path.parent / "out of the way")
    else:
        path.unlink()


def test_what_runs_leave_is_accepted(run: Path, tmp_path: Path) -> None:
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (run / "notes.txt").symlink_to(tmp_path)
    refuse_links(run)
    (tmp_path / "linked").symlink_to(run)
    refuse_links(tmp_path / "linked")
    refuse_links(tmp_path / "not there")


@pytest.mark.parametrize("target", ["folder", "file", "nothing"])
@pytest.mark.parametrize("name", FOLDERS + FILES)
def test_a_link_is_refused_wherever_it_leads(run: Path, tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    remove(run / name)
    (run / name).symlink_to(tmp_path / target)
    with pytest.raises(UserError) as caught:
        refuse_links(run)
    assert not isinstance(caught.value, TryAgain)
    assert str(caught.value).startswith(
        f"{run / name}: a link to {tmp_path / target}, and a run writes only inside"
    )


@pytest.mark.parametrize("name", FOLDERS + FILES)
def test_what_is_of_another_kind_is_refused(run: Path, name: str) -> None:
    remove(run / name)
    os.mkfifo(run / name)
    with pytest.raises(UserError, match="a named pipe, where a run has a "):
        refuse_links(run)
    (run / name).unlink()
    if name in FILES and not name.startswith("tensorboard"):
        (run / name).mkdir()
    elif name in FOLDERS and name != "logs/77.0":
        (run / name).touch()
    else:
        return
    with pytest.raises(
        UserError, match=r": a (folder|regular file), where a run has a (regular file|folder); remove it"
    ):
        refuse_links(run)


def test_what_a_stranger_calls_a_file_is_one_line(run: Path) -> None:
    (run / "checkpoints" / "step_1\n\x1b[2Jerror: fine").symlink_to("\n\x1b[2J")
    with pytest.raises(UserError) as caught:
        refuse_links(run)
    assert str(caught.value).isprintable()


def test_a_disk_that_does_not_answer_is_asked_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))
    real, failures = os.lstat, [errno.EIO]

    def failing(path: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        return real(path)

    monkeypatch.setattr(run_folder.os, "lstat", failing)
    refuse_links(run)
    failures += [errno.ESTALE] * 2
    with pytest.raises(TryAgain, match="checkpoints: cannot be read"):
        refuse_links(run)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("file", "{0}/file: a regular file, where the run folder belongs"),
        ("file/run", "{0}/file: a regular file, where a folder for {0}/file/run belongs"),
        ("file/deep/run", "{0}/file: a regular file, where a folder for {0}/file/deep/run belongs"),
        ("pipe/run", "{0}/pipe: a named pipe, where a folder for {0}/pipe/run belongs"),
        ("dangling", "{0}/dangling: a link to nothing, where the run folder belongs"),
        ("dangling/run", "{0}/dangling: a link to nothing, where a folder for {0}/dangling/run belongs"),
    ],
)
def test_a_file_where_a_folder_belongs_is_named(tmp_path: Path, folder: str, said: str) -> None:
    """Also above the run folder, which cannot be made there however often it is tried."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        refuse_links(tmp_path / folder)
    assert not isinstance(error.value, TryAgain) and str(error.value).startswith(said.format(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("there", [True, False])
def test_a_run_folder_that_cannot_be_written_is_no_reason_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, there: bool
) -> None:
    """At once, whether the folder or the first file in it cannot be made: a read-only disk stays one."""
    from megatron_lpa.config import RunConfig
    from megatron_lpa.parallel.groups import ParallelGroups
    from megatron_lpa.train import start

    folder = tmp_path / "run"
    if there:
        folder.mkdir()

    def refused(path: object, *_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "PAUSES_S", (1e6,))
    monkeypatch.setattr(os, "mkdir", refused)
    opened = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest: refused(path) if str(path).endswith(".lock") else opened(path, *rest)
    )
    with pytest.raises(UserError) as error:
        start._own_folder(folder, RunConfig(), ParallelGroups.single())
    assert error.value.exit_code == 78
    assert f"{folder}: cannot be written" in str(error.value) and "logging.run_dir" in str(error.value)


def test_a_checkpoint_that_cannot_be_looked_at_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("step_00000008", "step_00000012"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert run_folder.newest_step(tmp_path) == 12

    def is_file(path: Path) -> bool:
        if "12" in str(path):
            raise UserError("its folder must not be read")
        return files.is_file(path)

    monkeypatch.setattr(run_folder, "is_file", is_file)
    assert run_folder.newest_step(tmp_path) == 8
