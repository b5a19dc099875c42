"""What Divergence decides, whatever it was stopped and started between."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lpa.checkpoint.progress import (
    AT_START,
    FEWEST_STEPS,
    WINDOW_STEPS,
    Decisions,
    Progress,
    decisions_from_json,
)
from megatron_lpa.config.run import TrainConfig
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.train.callbacks import divergence as module
from megatron_lpa.train.callbacks.callback import RollBack
from megatron_lpa.train.callbacks.divergence import Divergence

SKIPPED = None
"""In place of the loss of a step that changed nothing."""


class Stepping:
    """A run of which only decisions are real."""

    def __init__(self, **train: Any) -> None:
        engine = SimpleNamespace(
            skipped_steps=0, groups=ParallelGroups.single(), mean_over_replicas=lambda loss: loss
        )
        config = SimpleNamespace(train=TrainConfig(**train))
        self.run: Any = SimpleNamespace(config=config, engine=engine, progress=Progress(), resumed=None)
        self.decisions = AT_START
        self.start()

    def start(self) -> None:
        """A new process: all that it has is what the manifest holds."""
        kept = decisions_from_json(json.loads(json.dumps(asdict(self.decisions))))
        self.run.resumed = SimpleNamespace(decisions=kept)
        self.callback = Divergence(SimpleNamespace(on_event=lambda *_: None))  # type: ignore[arg-type]
        self.callback.on_start(self.run)
        self.decisions = self.callback.decisions

    def step(self, loss: float | None) -> str:
        """Why the run goes back because of this step, or nothing."""
        self.run.engine.skipped_steps += loss is SKIPPED
        report: Any = SimpleNamespace(
            result=SimpleNamespace(loss=torch.tensor(math.nan if loss is None else loss))
        )
        try:
            self.callback.after_step(self.run, report)
        except RollBack as request:
            back = request.decisions.after_going_back(request.decisions)
            self.callback.after_rollback(self.run, SimpleNamespace(decisions=back))  # type: ignore[arg-type]
            return str(request)
        finally:
            self.decisions = self.callback.decisions
        return ""


def expected(losses: list[float | None], most_skipped: int, spike: float) -> list[bool]:
    """The rules in plain words: whether the run goes back because of each step. Going back takes the step
    out."""
    known: list[float] = []
    row, answers = 0, []
    for loss in losses:
        if loss is None:
            row += 1
            bad = row == most_skipped
        else:
            loss = float(torch.tensor(loss))
            window = known[-50:]
            bad = len(window) >= 10 and loss - sum(window) / len(window) > spike
            row = row if bad else 0
            known = known if bad else [*known, loss]
        row = 0 if bad else row
        answers.append(bad)
    return answers


@pytest.mark.parametrize("seed", range(4))
def test_a_stop_between_any_two_steps_changes_no_decision(seed: int) -> None:
    draw = random.Random(seed)
    losses = [SKIPPED if draw.random() < 0.3 else draw.gauss(3.0, 0.5) for _ in range(300)]
    rules = {"max_skipped_steps": 3, "loss_spike": 1.0}
    undisturbed, stopped = Stepping(**rules), Stepping(**rules)
    for loss, bad in zip(losses, expected(losses, 3, 1.0), strict=True):
        stopped.start()
        reason = undisturbed.step(loss)
        assert stopped.step(loss) == reason
        assert bool(reason) == bad
        assert stopped.decisions == undisturbed.decisions
    assert undisturbed.decisions.rollbacks > 3


def test_all_ranks_decide_by_one_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose sums differ in the last bits: what rank 0 saves is what every rank compares with."""
    others = 3.0 + 1e-6
    monkeypatch.setattr(module, "gather_numbers", lambda own, groups: [own, others])
    stepping = Stepping(loss_spike=1.0)
    for _ in range(FEWEST_STEPS):
        assert not stepping.step(3.0)
    assert stepping.decisions.losses == (others,) * FEWEST_STEPS
    monkeypatch.setattr(module, "gather_numbers", lambda own, groups: [own, math.nan])
    assert "the loss is inf" in stepping.step(3.0)  # a jump on one is one on all


def test_losses_that_are_not_finite_are_none_to_compare_with() -> None:
    stepping = Stepping(loss_spike=1.0)
    for loss in (math.inf, math.nan, *[3.0] * FEWEST_STEPS):
        assert not stepping.step(loss)
    assert stepping.decisions.losses == (3.0,) * FEWEST_STEPS
    assert not stepping.step(3.5) and stepping.step(4.5)


def test_losses_of_long_ago_are_forgotten_by_a_run_that_does_not_ask_for_them() -> None:
    stepping = Stepping(loss_spike=1.0)
    for _ in range(20):
        stepping.step(9.0)
    stepping.run.config.train = replace(stepping.run.config.train, loss_spike=0.0)
    stepping.start()
    assert stepping.decisions.losses == ()
    assert not stepping.step(3.0) and stepping.decisions.losses == ()


def test_after_going_back_the_checkpoints_losses_are_compared_with() -> None:
    high, low = tuple(6.0 + i / 100 for i in range(30)), tuple(3.0 for _ in range(WINDOW_STEPS))
    back = Decisions(2, low, 1).after_going_back(Decisions(3, high, 0))
    assert back == Decisions(skipped_in_a_row=0, losses=high, rollbacks=2)
    # Too few there: the ones that followed complete them, as long as none has left the window.
    early = high[:5]
    assert Decisions(0, high, 0).after_going_back(Decisions(0, early, 0)).losses == high[:FEWEST_STEPS]
    assert Decisions(0, high[:7], 0).after_going_back(Decisions(0, early, 0)).losses == high[:7]
    assert Decisions(0, low, 0).after_going_back(Decisions(0, early, 0)).losses == early


@pytest.mark.parametrize(
    "content",
    [
        None, [], "3", {"rollbacks": True}, {"rollbacks": -1}, {"rollbacks": 1.0}, {"skipped_in_a_row": None},
        {"skipped_in_a_row": "3"}, {"skipped_in_a_row": 10**400}, {"losses": None}, {"losses": {"0": 1.0}},
        {"losses": [math.nan]}, {"losses": [math.inf]}, {"losses": [True]}, {"losses": ["1"]},
        {"losses": [10**400]},
    ],
)  # fmt: skip
def test_what_is_not_decisions_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="decisions") as caught:
        decisions_from_json(content)
    assert len(str(caught.value)) < 100


def test_what_is_missing_is_as_at_the_start() -> None:
    assert decisions_from_json({}) == AT_START == Decisions(0, (), 0)
    assert decisions_from_json({"rollbacks": 2, "of a later version": 1}) == Decisions(rollbacks=2)
    many = [float(i) for i in range(80)]
    assert decisions_from_json({"losses": many}).losses == tuple(many[-WINDOW_STEPS:])
