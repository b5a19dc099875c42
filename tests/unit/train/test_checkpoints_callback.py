"""Which checkpoints are tried after one that was on its way has failed."""

from __future__ import annotations

import math
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
from megatron_lpa.train.callbacks import evaluation as evaluation_module
from megatron_lpa.train.callbacks.checkpoints import Checkpoints
from megatron_lpa.train.callbacks.evaluation import Evaluation, EvaluationResult
from megatron_lpa.train.schedule import is_due


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


def test_a_step_that_comes_again_after_going_back_is_saved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "begin_save", FakeSaving)
    monkeypatch.setattr(module, "EngineState", state_that_is(finite=True))
    monkeypatch.setattr(FakeSaving, "broken", ())
    monkeypatch.setattr(FakeSaving, "written", [])
    run: Any = SimpleNamespace(
        config=SimpleNamespace(train=TrainConfig(checkpoint_interval=3)), steps=9, resumed=None, is_main=True,
        checkpoints=Path("x"), order=None, splits=SimpleNamespace(valid=None, test=None),
        engine=SimpleNamespace(groups=ParallelGroups.single()), progress=Progress(step=9),
        enter=lambda stage: None, has_lost_folder=lambda: False,
    )  # fmt: skip
    metrics: Any = SimpleNamespace(emit=lambda *_: None, unrecorded=lambda run: NOTHING_UNRECORDED)
    validation: Any = SimpleNamespace(validation_loss=lambda step: None)
    callback = Checkpoints(metrics, validation, SimpleNamespace(decisions=AT_START))  # type: ignore[arg-type]
    callback.after_step(run, SimpleNamespace())  # type: ignore[arg-type]
    callback.after_step(run, SimpleNamespace())  # type: ignore[arg-type]
    callback.after_rollback(run, SimpleNamespace(progress=Progress(step=6)))  # type: ignore[arg-type]
    callback.after_step(run, SimpleNamespace())  # type: ignore[arg-type]
    assert FakeSaving.written == [9, 9]


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
        config=SimpleNamespace(train=train), steps=steps, resumed=None, is_main=True, checkpoints=Path("x"),
        order=None, stopping=SimpleNamespace(stopped_by=0), splits=SimpleNamespace(valid=None, test=None),
        engine=SimpleNamespace(groups=ParallelGroups.single()), progress=Progress(), enter=lambda stage: None,
    )  # fmt: skip
    run.has_lost_folder = lambda: run.progress.step >= lost_at
    callback = Checkpoints(
        SimpleNamespace(emit=lambda *_: None, unrecorded=lambda run: NOTHING_UNRECORDED),
        SimpleNamespace(validation_loss=lambda step: None),
        SimpleNamespace(decisions=AT_START),
    )  # type: ignore[arg-type]
    callback.on_start(run)
    for step in range(1, steps + 1):
        run.progress = Progress(step=step)
        if is_due(callback.every, step, steps):
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
        engine=SimpleNamespace(groups=ParallelGroups.single()), progress=Progress(step=6),
        stopping=SimpleNamespace(stopped_by=15),
        has_lost_folder=lambda: False,
    )  # fmt: skip
    metrics: Any = SimpleNamespace(emit=lambda run, record: told.append(record["message"]))
    callback = Checkpoints(metrics, Evaluation(metrics), SimpleNamespace(decisions=AT_START))  # type: ignore[arg-type]
    callback.saved_step = 4
    callback.on_finish(run)
    assert len(told) == 1 and "nothing is saved" in told[0] and "from step 4" in told[0]
    for stopped_by, saved_step in ((0, 4), (15, -1)):  # complete, or without anything to go back to
        run.stopping.stopped_by, callback.saved_step = stopped_by, saved_step
        with pytest.raises(UserError, match="training has diverged"):
            callback.on_finish(run)


@pytest.mark.parametrize("loss", [3.0, math.nan, math.inf])
def test_a_checkpoint_has_the_validation_of_its_own_weights_if_it_is_finite(
    monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    monkeypatch.setattr(evaluation_module, "evaluate_split", lambda *_: EvaluationResult(8, loss, 64))
    records: list[dict[str, Any]] = []
    metrics: Any = SimpleNamespace(emit=lambda run, record: records.append(record))
    evaluation, train = Evaluation(metrics), TrainConfig(eval_interval=8)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(train=train), progress=Progress(step=8), splits=SimpleNamespace(valid=object())
    )
    evaluation.after_step(run, SimpleNamespace())  # type: ignore[arg-type]
    assert len(records) == 1 and records[0]["step"] == 8
    assert evaluation.validation_loss(8) == (loss if math.isfinite(loss) else None)
    assert evaluation.validation_loss(9) is None
    evaluation.after_rollback(run, SimpleNamespace())  # type: ignore[arg-type]
    assert evaluation.validation_loss(8) is None  # the weights of that step are gone
