"""Length of a run, its learning rate and what is due in it, as pure functions: nothing to save, nothing to
restore."""

from __future__ import annotations

import math

from megatron_lpa.config import ModelConfig, OptimConfig, TrainConfig
from megatron_lpa.config.validation import planned_steps
from megatron_lpa.errors import UserError


def total_steps(train: TrainConfig, model: ModelConfig, samples_per_epoch: int) -> int:
    """Optimizer steps of a run, from whichever of steps, tokens and epochs is set.

    Raises:
        UserError: none or several are set.
    """
    lengths = [value for value in (train.steps, train.tokens, train.epochs) if value is not None]
    if len(lengths) != 1:
        raise UserError("set exactly one of train.steps, train.tokens and train.epochs")
    steps = planned_steps(train, model)
    if steps is not None:
        return steps
    assert train.epochs is not None
    return math.ceil(train.epochs * samples_per_epoch / train.global_batch_size)


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate of one optimizer step.

    Warm-up is linear over ``warmup_steps`` and reaches ``lr`` in its last step; then ``cosine`` and
    ``linear`` fall to ``lr * min_lr_ratio`` at ``decay_steps``, ``constant`` stays, and ``wsd`` stays and
    falls linearly over the last ``wsd_decay_fraction`` of the run (arXiv 2404.06395).

    Args:
        step: steps done before this one, from 0.
        steps: steps of the run.
        optim: the schedule.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    lowest = optim.lr * optim.min_lr_ratio
    end = optim.decay_steps or steps
    start = optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":
        start = max(start, end - round(end * optim.wsd_decay_fraction))
        if step < start:
            return optim.lr
    done = min(1.0, (step - start) / max(1, end - start))
    falling = 0.5 * (1.0 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1.0 - done
    return lowest + (optim.lr - lowest) * falling


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether what comes ``every`` so many steps of ``steps``, and after the last, comes after ``step``; 0
    never comes."""
    return every > 0 and (step % every == 0 or step == steps)
