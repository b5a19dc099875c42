"""What a problem that all ranks agreed on ends with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.config.run import TrainConfig
from megatron_lpa.errors import AgreedProblem
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.train import loop
from megatron_lpa.train.callbacks.callback import Callback
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
