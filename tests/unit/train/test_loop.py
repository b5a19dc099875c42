"""When callbacks are called, and what a problem that all ranks agreed on ends with."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.config import ModelConfig, OptimConfig, TrainConfig
from megatron_lpa.errors import AgreedProblem, UserError
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.train import loop
from megatron_lpa.train.callbacks.callback import Callback
from megatron_lpa.train.stopping import Stopping, StopRequest
from megatron_lpa.train.watchdog import Watchdog


class Told(Callback):
    """Takes note of the hooks; ``problem_in`` names one that finds a problem."""

    def __init__(self, problem_in: str = "") -> None:
        self.hooks: list[str] = []
        self._problem_in = problem_in

    def after_step(self, run: Any, report: Any) -> None:
        self.hooks.append("after_step")
        if self._problem_in == "after_step":
            raise AgreedProblem("rank 1: the validation split cannot be read", 1)

    def before_failure(self, run: Any) -> None:
        self.hooks.append("before_failure")

    def close(self, run: Any) -> None:
        self.hooks.append("close")


@pytest.mark.parametrize("where", ["step", "after_step"])
def test_callbacks_are_told_before_a_problem_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def step(run: Any) -> Any:
        if where == "step":
            raise AgreedProblem("rank 1: data.bin cannot be read", 1)
        return SimpleNamespace()

    monkeypatch.setattr(loop, "train_one_step", step)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(train=TrainConfig(step_timeout_s=0.0)), folder=tmp_path, steps=3,
        progress=Progress(),
        engine=SimpleNamespace(groups=ParallelGroups.single()), enter=lambda stage: None, watchdog=Watchdog(),
    )  # fmt: skip
    first, second = Told(where), Told()
    with pytest.raises(AgreedProblem, match="rank 1: "):
        loop.train(run, [first, second])
    steps = ["after_step"] if where == "after_step" else []
    assert first.hooks == [*steps, "before_failure", "close"]
    assert second.hooks == ["before_failure", "close"]


@pytest.mark.parametrize(("every", "called"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5]), (0, [])])
def test_a_callback_is_called_after_the_steps_that_it_asks_for(
    monkeypatch: pytest.MonkeyPatch, every: int, called: list[int]
) -> None:
    steps: list[int] = []

    class Asked(Callback):
        def after_step(self, run: Any, report: Any) -> None:
            steps.append(run.progress.step)

    def step(run: Any) -> Any:
        run.progress = Progress(run.progress.step + 1)
        return SimpleNamespace()

    monkeypatch.setattr(loop, "train_one_step", step)
    callback = Asked()
    callback.every = every
    loop._train_all_steps(
        SimpleNamespace(steps=5, progress=Progress(), watchdog=Watchdog()),  # type: ignore[arg-type]
        [callback],
    )
    assert steps == called


@pytest.mark.parametrize("due", [False, True])
def test_the_lock_of_the_run_folder_is_looked_at_when_its_time_has_come(
    monkeypatch: pytest.MonkeyPatch, due: bool
) -> None:
    """Else a step waits for a disk at every turn. What is found ends the run before the step."""
    groups = ParallelGroups.single()
    monkeypatch.setattr(loop, "_read_batches", lambda run: ([], [], None))
    run: Any = SimpleNamespace(
        progress=Progress(), steps=5, watchdog=Watchdog(), stopping=Stopping(groups, StopRequest()),
        lock=SimpleNamespace(
            next_look_s=time.monotonic() + (-1 if due else 3600), lost=lambda: UserError("the lock is gone")
        ),
        config=SimpleNamespace(optim=OptimConfig(), train=TrainConfig(), model=ModelConfig()),
        engine=SimpleNamespace(train_step=lambda *_: None, groups=groups),
    )  # fmt: skip
    if due:
        with pytest.raises(AgreedProblem, match="the lock is gone"):
            loop.train_one_step(run)
        assert run.progress.step == 0
    else:
        loop.train_one_step(run)
        assert run.progress.step == 1
