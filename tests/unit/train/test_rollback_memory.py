"""What ``passed_over.json`` counts for, and what a run does without or with a broken one."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.manifests import put, small_checkpoint

from megatron_lpa import files
from megatron_lpa.checkpoint.progress import AT_START, Decisions, Progress
from megatron_lpa.checkpoint.resume import Resumed
from megatron_lpa.config.run import TrainConfig
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.run_folder import MANIFEST, PASSED_OVER
from megatron_lpa.train import rollback
from megatron_lpa.train.rollback import recall, roll_back

SAVED, THEN = Decisions(2, (3.5, 0.1 + 0.2), 1), Decisions(0, (3.5, 3.25), 2)


def run_at(folder: Path, step: int, seal: str = "s", decisions: Decisions | None = SAVED) -> Any:
    progress = Progress(step, 8 * step, 128 * step, 16)
    train = TrainConfig(max_rollbacks=3, checkpoint_interval=4, keep_checkpoints=2)
    return SimpleNamespace(
        checkpoints=folder, progress=progress, is_main=True, order=None,
        engine=SimpleNamespace(groups=ParallelGroups.single()), config=SimpleNamespace(train=train),
        lock=None,
        resumed=Resumed(folder / f"step_{step:08d}", progress, seal, decisions),
    )  # fmt: skip


BEFORE = Decisions(3, (3.0,) * 12, 1)
"""What the run knows at the bad step."""


def remember(folder: Path, **changed: Any) -> None:
    content = {"step": 4, "checkpoint": "s", "skipped_samples": 24, "decisions": asdict(THEN), **changed}
    (folder / PASSED_OVER).write_text(json.dumps(content))


def recalled(run: Any) -> tuple[int, Decisions | None]:
    resumed = recall(run.resumed, run.engine.groups)
    return resumed.progress.skipped_samples, resumed.decisions


def test_it_counts_for_the_checkpoint_that_it_names_and_no_other(tmp_path: Path) -> None:
    assert recalled(run_at(tmp_path, 4)) == (16, SAVED)
    remember(tmp_path)
    assert recalled(run_at(tmp_path, 4)) == (24, THEN)
    assert recalled(run_at(tmp_path, 4, seal="another")) == (16, SAVED)
    of_an_earlier_version = run_at(tmp_path, 4, seal="without the validation loss")
    of_an_earlier_version.resumed = replace(of_an_earlier_version.resumed, checksum="s")
    assert recalled(of_an_earlier_version) == (24, THEN)
    assert recalled(run_at(tmp_path, 3)) == (16, SAVED)
    assert recalled(run_at(tmp_path, 8)) == (16, SAVED)


def test_checkpoints_and_memories_of_earlier_versions_are_understood(tmp_path: Path) -> None:
    assert recalled(run_at(tmp_path, 4, decisions=None)) == (16, AT_START)
    (tmp_path / PASSED_OVER).write_text(
        '{"step": 4, "checkpoint": "s", "skipped_samples": 24, "rollbacks": 2}'
    )
    assert recalled(run_at(tmp_path, 4, decisions=None)) == (24, Decisions(rollbacks=2))
    assert recalled(run_at(tmp_path, 8, decisions=None)) == (16, Decisions(rollbacks=2))
    assert recalled(run_at(tmp_path, 3, decisions=None)) == (16, AT_START)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "null", "{}", '{"step": 4', "[" * 100_000, "\udc80", '{"step": NaN}',
        *(json.dumps({"step": 4, "checkpoint": "s", "skipped_samples": 24, "decisions": {}} | change) for change in (  # noqa: E501
            {"step": None}, {"step": "4"}, {"step": -1}, {"step": True}, {"step": 10**300},
            {"skipped_samples": 1.5},
            {"skipped_samples": -8}, {"skipped_samples": None}, {"decisions": None},
            {"decisions": {"rollbacks": -1}},
        )),
    ],
)  # fmt: skip
def test_what_is_no_memory_is_one_short_line(tmp_path: Path, content: str) -> None:
    (tmp_path / PASSED_OVER).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="remove it, and the data that was passed over then is read again") as caught:  # fmt: skip  # noqa: E501
        recalled(run_at(tmp_path, 4))
    assert caught.value.exit_code == 78
    assert (
        str(tmp_path / PASSED_OVER) in str(caught.value) and len(str(caught.value)) < len(str(tmp_path)) + 250
    )


def test_a_disk_that_does_not_answer_is_asked_again_and_is_no_reason_to_give_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(tmp_path)
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0))
    failures, opening = [errno.ESTALE, errno.EIO], os.open

    def fails(path: Any, *more: Any, **named: Any) -> int:
        if str(path).endswith(PASSED_OVER) and failures:
            raise OSError(failures.pop(), "the disk")
        return opening(path, *more, **named)

    monkeypatch.setattr(os, "open", fails)
    assert recalled(run_at(tmp_path, 4)) == (24, THEN)
    failures.extend([errno.EIO] * 3)
    with pytest.raises(TryAgain) as caught:
        recalled(run_at(tmp_path, 4))
    assert caught.value.exit_code == 1


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names handed to ``load_newest``, which takes the last one."""
    names: list[str] = []

    def load(engine: Any, checkpoints: list[Path], order: Any) -> Resumed:
        names[:] = [path.name for path in checkpoints]
        step = int(names[-1][5:])
        return Resumed(checkpoints[-1], Progress(step, 8 * step, 128 * step), "s", SAVED)

    monkeypatch.setattr(rollback, "load_newest", load)
    monkeypatch.setattr(rollback, "EngineState", lambda engine: engine)
    return names


def bad_step(folder: Path, steps: tuple[int, ...], interval: int, **train: Any) -> Any:
    for step in steps:
        small_checkpoint(folder, step)
    run = run_at(folder, 15)
    run.config.train = replace(run.config.train, checkpoint_interval=interval, **train)
    return run


@pytest.mark.parametrize(
    ("interval", "taken", "left"), [(4, 12, (4, 7, 12)), (5, 14, (4, 7, 12, 14)), (7, 14, (4, 7, 12, 14)), (0, 14, (4, 7, 12, 14))]  # noqa: E501
)  # fmt: skip
def test_it_goes_back_to_where_a_run_that_was_never_stopped_would(
    tmp_path: Path, tried: list[str], interval: int, taken: int, left: tuple[int, ...]
) -> None:
    run = bad_step(tmp_path, (4, 7, 12, 14), interval)
    resumed = roll_back(run, "a bad step", BEFORE)
    assert resumed.progress.step == taken and len(tried) == 4
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == [f"step_{step:08d}" for step in left]
    assert [note.split(":")[0] for note in resumed.notes] == ["step_00000014 is removed"] * (taken != 14)
    # Behind the bad step, whatever was read since the checkpoint.
    assert resumed.progress.position == 15 * 8 + 16
    assert resumed.decisions is not None
    assert resumed.decisions.rollbacks == 2 and resumed.decisions.skipped_in_a_row == 0
    # Killed here, the next start decides alike.
    again = run_at(tmp_path, taken)
    assert recalled(again) == (resumed.progress.skipped_samples, resumed.decisions)


def test_an_interval_that_was_changed_takes_it_no_further_back(tmp_path: Path, tried: list[str]) -> None:
    """Steps 1 to 7 at an interval of 1, then 8 at a stop, with an interval of 5 and one rule that names them
    all."""
    run = bad_step(tmp_path, tuple(range(1, 9)), 5, keep_every=1)
    for step in range(1, 9):
        path = tmp_path / f"step_{step:08d}"
        put(path, {**json.loads((path / MANIFEST).read_text()), "at_interval": step < 8})
    resumed = roll_back(run, "a bad step", BEFORE)
    assert resumed.progress.step == 7
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{n:08d}" for n in range(1, 8)]
    assert (tmp_path / "passed_step_00000008/state/x").read_bytes() == b"0123456789"
    (note,) = resumed.notes
    assert "step_00000008 is now passed_step_00000008" in note and "train.keep_every=1 keeps it" in note


@pytest.mark.parametrize(
    "error", [TryAgain("the disk"), UserError("not yours"), OSError(errno.EIO, "the disk")]
)
def test_a_folder_that_cannot_be_read_does_not_keep_a_run_from_going_back(
    tmp_path: Path, tried: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The state has been replaced by then; rank 0 alone must not end."""

    def fails(*_: Any) -> list[str]:
        raise error

    monkeypatch.setattr(rollback, "pass_over", fails)
    (note,) = roll_back(bad_step(tmp_path, (4, 8), 4), "a bad step", BEFORE).notes
    assert str(error) in note and "the next start may have to go back again" in note


def test_what_nobody_foresaw_ends_all_ranks_together(
    tmp_path: Path, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> list[str]:
        raise KeyError("x")

    monkeypatch.setattr(rollback, "pass_over", fails)
    with pytest.raises(TryAgain, match="KeyError: 'x'"):  # what ``together`` makes of it, on every rank
        roll_back(bad_step(tmp_path, (4, 8), 4), "a bad step", BEFORE)


def test_a_full_disk_does_not_keep_a_run_from_going_back(
    tmp_path: Path, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rollback, "write_whole", full)
    (note,) = roll_back(bad_step(tmp_path, (8,), 4), "a bad step", BEFORE).notes
    assert "No space left on device" in note and "would read the bad data again" in note


def test_the_count_of_the_run_ends_it_not_that_of_the_checkpoint(tmp_path: Path, tried: list[str]) -> None:
    run = bad_step(tmp_path, (8,), 4)
    decisions: Decisions | None = BEFORE
    for _ in range(2):
        assert decisions is not None
        decisions = roll_back(run, "a bad step", decisions).decisions
    with pytest.raises(UserError, match="after going back 3 times"):
        roll_back(run, "a bad step", decisions)  # type: ignore[arg-type]
