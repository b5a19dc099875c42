"""Which checkpoints are tried after one that was on its way has failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lpa.checkpoint.progress import AT_START, NOTHING_UNRECORDED, Progress
from megatron_lpa.checkpoint.saving import CheckpointNotWritten
from megatron_lpa.config.run import TrainConfig
from megatron_lpa.engine.joining import collective_timeout
from megatron_lpa.errors import UserError
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.train.callbacks import checkpoints as module
from megatron_lpa.train.callbacks.checkpoints import Checkpoints, LastValidation


class FakeSaving:
    """Written in no time; those of ``broken`` steps fail when they are completed."""

    broken: tuple[int, ...] = ()
    written: list[int] = []  # noqa: RUF012 - emptied by each test
    written_here, blocked_s = False, 0.0

    def __init__(self, state: Any, folder: Any, progress: Progress, *_: Any) -> None:
        self.progress = progress

    def complete(self) -> Path:
        if self.progress.step in self.broken:
            raise CheckpointNotWritten("the disk was full")
        self.written.append(self.progress.step)
        return Path(f"step_{self.progress.step:08d}")


def state_that_is(finite: bool) -> Any:
    return lambda engine: SimpleNamespace(groups=engine.groups, is_finite=lambda: finite)


def trained(
    monkeypatch: pytest.MonkeyPatch, steps: int, broken: tuple[int, ...], on_failure: str, lost_at: int = 1000
) -> list[int]:
    monkeypatch.setattr(module, "begin_save", FakeSaving)
    monkeypatch.setattr(module, "EngineState", state_that_is(finite=True))
    monkeypatch.setattr(FakeSaving, "broken", broken)
    monkeypatch.setattr(FakeSaving, "written", [])
    train = TrainConfig(checkpoint_interval=3, on_checkpoint_failure=on_failure)  # type: ignore[arg-type]
    run: Any = SimpleNamespace(
        config=SimpleNamespace(train=train), steps=steps, saved_step=-1, is_main=True, checkpoints=Path("x"), order=None, stopped_by=0, decisions=AT_START, splits=SimpleNamespace(valid=None, test=None),
        engine=SimpleNamespace(groups=ParallelGroups.single()), progress=Progress(), enter=lambda stage: None,
    )  # fmt: skip
    run.has_lost_folder = lambda: run.progress.step >= lost_at
    callback = Checkpoints(
        SimpleNamespace(emit=lambda *_: None, unrecorded=lambda run: NOTHING_UNRECORDED),
        SimpleNamespace(loss_at=lambda step: None),
    )  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        run.progress = Progress(step=step)
        callback.after_step(run, SimpleNamespace())  # type: ignore[arg-type]
    callback.on_finish(run)
    return FakeSaving.written


def test_a_failed_one_does_not_keep_the_next_from_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of step 6 turns out to have failed when that of step 9, the last, is due."""
    assert trained(monkeypatch, 9, (6,), "continue") == [3, 9]
    assert trained(monkeypatch, 12, (6,), "continue") == [3, 9, 12]
    assert trained(monkeypatch, 8, (6,), "continue") == [3, 8]


def test_the_last_one_has_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointNotWritten):
        trained(monkeypatch, 9, (9,), "continue")


def test_the_first_failure_ends_a_run_that_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointNotWritten):
        trained(monkeypatch, 9, (3,), "stop")


@pytest.mark.parametrize(("lost_at", "written"), [(6, [3]), (7, [3]), (8, [3, 6])])
def test_nothing_is_written_once_the_folder_is_another_runs(
    monkeypatch: pytest.MonkeyPatch, lost_at: int, written: list[int]
) -> None:
    """Not the one on its way either, which is completed a step later here."""
    monkeypatch.setattr(FakeSaving, "written_here", True)
    assert trained(monkeypatch, 12, (), "continue", lost_at) == written


def test_collectives_wait_longer_than_the_watchdog() -> None:
    for limit_s in (TrainConfig().step_timeout_s, 10.0, 86_400.0):
        assert collective_timeout(limit_s).total_seconds() >= limit_s + 60
    assert collective_timeout(0).total_seconds() >= 1800


def test_a_stop_with_a_state_that_is_not_finite_leaves_going_back_to_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "EngineState", state_that_is(finite=False))
    told: list[str] = []
    run: Any = SimpleNamespace(
        engine=SimpleNamespace(groups=ParallelGroups.single()), progress=Progress(step=6), saved_step=4, stopped_by=15,
        has_lost_folder=lambda: False,
    )  # fmt: skip
    metrics: Any = SimpleNamespace(emit=lambda run, record: told.append(record["message"]))
    callback = Checkpoints(metrics, LastValidation())
    callback.on_finish(run)
    assert len(told) == 1 and "nothing is saved" in told[0] and "from step 4" in told[0]
    for changed in ({"stopped_by": 0}, {"saved_step": -1}):  # complete, or without anything to go back to
        with pytest.raises(UserError, match="training has diverged"):
            callback.on_finish(SimpleNamespace(**{**vars(run), **changed}))


def test_the_validation_of_weights_that_are_gone_is_not_that_of_a_checkpoint() -> None:
    validation = LastValidation()
    validation.write({"kind": "valid", "step": 8, "loss": 3.0})
    assert validation.loss_at(8) == 3.0
    run: Any = SimpleNamespace(progress=Progress(step=4))
    validation.rewind(run)
    assert validation.loss_at(8) is None
