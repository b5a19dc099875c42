"""What a start says of settings that differ from those of its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from megatron_lpa.config import OptimConfig, RunConfig, TrainConfig
from megatron_lpa.train.changes import changed_settings, learning_rate_jump, settings_of

EARLIER = RunConfig(
    optim=OptimConfig(lr=0.006, warmup_steps=0, schedule="cosine", min_lr_ratio=0.1),
    train=TrainConfig(steps=30),
)


def test_a_manifest_gives_its_settings_back_also_those_of_an_earlier_version() -> None:
    saved = json.loads(json.dumps(asdict(EARLIER)))
    assert settings_of(saved, "step_00000030") == EARLIER
    del saved["optim"]["wsd_decay_fraction"], saved["kernels"]
    assert settings_of(saved, "step_00000030") == EARLIER
    no_batch = {**saved, "train": {"steps": 8, "global_batch_size": 0}}
    for strange in (
        {},
        no_batch,
        {"optim": {"lr": "fast"}},
        {"optim": 3},
        {"optim": {"later": 1}},
        [],
        {"train": []},
    ):
        assert settings_of(strange, "step_00000030") is None  # type: ignore[arg-type]


def test_paths_of_a_manifest_are_what_they_meant() -> None:
    for data in (replace(EARLIER.data, prefix="x/$y"), replace(EARLIER.data, blend={"a$b": 2.0, "c": 1.0})):
        meant = replace(EARLIER, data=data)
        assert settings_of(json.loads(json.dumps(asdict(meant))), "step_00000030") == meant


def test_every_setting_that_changed_is_named() -> None:
    changed = replace(EARLIER, optim=replace(EARLIER.optim, lr=0.1), train=replace(EARLIER.train, steps=60))
    assert changed_settings(EARLIER, changed) == ["optim.lr was 0.006, is 0.1", "train.steps was 30, is 60"]


def test_a_schedule_that_is_stretched_says_by_how_much_the_learning_rate_jumps() -> None:
    longer = replace(EARLIER, train=replace(EARLIER.train, steps=60))
    # Worked by hand: cos(pi/2) is 0, so half of the way from 0.0006 to 0.006 is 0.0033.
    message = learning_rate_jump(EARLIER, longer, 30, 1000)
    assert message is not None
    assert "to 0.0033 in step 31; with the earlier settings it would be 0.0006" in message
    assert (
        "spread over 60 steps now, over 30 before: set optim.decay_steps=30 to keep it as it was" in message
    )
    kept = replace(longer, optim=replace(longer.optim, decay_steps=30))
    assert learning_rate_jump(EARLIER, kept, 30, 1000) is None


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_schedules_that_are_still_level_go_on_without_a_word(schedule) -> None:
    earlier = replace(EARLIER, optim=replace(EARLIER.optim, schedule=schedule))
    longer = replace(earlier, train=replace(earlier.train, steps=60))
    assert learning_rate_jump(earlier, longer, 20, 1000) is None


def test_another_rate_jumps_without_talk_of_stretching() -> None:
    other = replace(EARLIER, optim=replace(EARLIER.optim, lr=0.06))
    message = learning_rate_jump(EARLIER, other, 10, 1000)
    assert message is not None and "the learning rate goes from" in message and "spread" not in message
    assert learning_rate_jump(EARLIER, other, 0, 1000) is None
    assert learning_rate_jump(EARLIER, other, 30, 1000) is None  # no step is left
