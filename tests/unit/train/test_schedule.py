"""Learning-rate schedules against transformers' and hand-worked values; run lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from megatron_lpa.config import ModelConfig, OptimConfig, TrainConfig
from megatron_lpa.errors import UserError
from megatron_lpa.train.schedule import learning_rate, total_steps


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_cosine_and_linear_equal_transformers_after_warm_up(schedule):
    optim = OptimConfig(lr=3e-4, schedule=schedule, warmup_steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = transformers.get_scheduler(schedule, optimizer, num_warmup_steps=10, num_training_steps=100)
    for step in range(100):
        expected = optimizer.param_groups[0]["lr"]
        if step >= 10:
            assert learning_rate(step, 100, optim) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        else:  # theirs starts at 0 and wastes a step; ours is one step ahead while warming up
            assert learning_rate(step, 100, optim) == pytest.approx(expected + 3e-5)
        optimizer.step()
        scheduler.step()


def test_hand_worked_points():
    cosine = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=4, decay_steps=12)
    assert [learning_rate(step, 100, cosine) for step in (0, 3, 4, 8, 12, 50)] == pytest.approx(
        [0.25, 1.0, 1.0, 0.55, 0.1, 0.1]
    )
    wsd = OptimConfig(lr=2.0, schedule="wsd", warmup_steps=10, wsd_decay_fraction=0.2)
    assert [learning_rate(step, 100, wsd) for step in (9, 50, 80, 90, 99)] == pytest.approx(
        [2.0, 2.0, 2.0, 1.0, 0.1]
    )
    constant = replace(wsd, schedule="constant", warmup_steps=0)
    assert {learning_rate(step, 100, constant) for step in range(100)} == {2.0}


def test_run_length_from_steps_tokens_or_epochs():
    model = ModelConfig(sequence_length=100)
    train = TrainConfig(global_batch_size=10)
    assert total_steps(replace(train, steps=7), model, 55) == 7
    assert total_steps(replace(train, tokens=10_001), model, 55) == 11
    assert total_steps(replace(train, epochs=2.0), model, 55) == 11
    with pytest.raises(UserError, match="exactly one"):
        total_steps(train, model, 55)
