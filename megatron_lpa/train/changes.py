"""What differs between the settings that a checkpoint was trained with and those of this start."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from megatron_lpa.config import RunConfig, validate_config
from megatron_lpa.config.compare import differences
from megatron_lpa.config.loading import config_from_tree
from megatron_lpa.errors import UserError
from megatron_lpa.train.schedule import learning_rate, total_steps


def settings_of(checkpoint_config: dict[str, Any], source: str) -> RunConfig | None:
    """The settings that a manifest names; None where this version cannot use them.

    Args:
        checkpoint_config: the manifest's ``config``.
        source: the checkpoint's name.
    """
    try:
        config = config_from_tree(checkpoint_config, source)
        validate_config(config, None, need_data=False)
        return config
    except (UserError, TypeError, AttributeError):  # of another version, or edited
        return None


def changed_settings(earlier: RunConfig, config: RunConfig) -> list[str]:
    """``key was x, is y`` for every setting that has changed."""
    return differences(asdict(earlier), asdict(config))


def learning_rate_jump(
    earlier: RunConfig, config: RunConfig, step: int, samples_per_epoch: int
) -> str | None:
    """What to say where the learning rate does not go on as the earlier settings have it; None where it does.

    Args:
        earlier: settings of the steps up to now.
        config: those of the steps from now on.
        step: steps done.
        samples_per_epoch: of the training split.
    """
    steps, earlier_steps = (
        total_steps(each.train, each.model, samples_per_epoch) for each in (config, earlier)
    )
    if not 0 < step < steps:
        return None
    last = learning_rate(step - 1, earlier_steps, earlier.optim)
    expected = learning_rate(step, earlier_steps, earlier.optim)
    own = learning_rate(step, steps, config.optim)
    if math.isclose(own, expected, rel_tol=1e-9, abs_tol=1e-15):
        return None
    message = (
        f"the learning rate goes from {last:.3g} in step {step} to {own:.3g} in step {step + 1}; with the "
        f"earlier settings it would be {expected:.3g}"
    )
    stretched = (
        steps != earlier_steps and config.optim.decay_steps is None and config.optim.schedule != "constant"
    )
    if stretched:
        message += (
            f". The schedule ({config.optim.schedule}) is spread over {steps} steps now, over "
            f"{earlier_steps} before: set optim.decay_steps={earlier.optim.decay_steps or earlier_steps} to "
            "keep it as it was"
        )
    return message
