"""The training loop. Everything that is not the step itself is a callback."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from megatron_lpa.data.batches import load_batch
from megatron_lpa.data.sampler import micro_batch_indices
from megatron_lpa.engine.manifest import Progress
from megatron_lpa.errors import UserError
from megatron_lpa.parallel.agreement import gather_messages, largest_of_all
from megatron_lpa.train.callbacks.base import Callback, StepReport
from megatron_lpa.train.schedule import learning_rate
from megatron_lpa.train.state import Run, agree_to_go_on


def train(run: Run, callbacks: Sequence[Callback]) -> int:
    """Train until the last step or a signal. Every rank calls it.

    Callbacks run in order, and in reverse order at the end, so that the first one sees everything.

    Returns:
        0 when the run is complete, the signal's number when it was asked to stop.

    Raises:
        UserError: on all ranks, when any rank cannot read its data or write its records.
    """
    try:
        for callback in callbacks:
            callback.on_start(run)
        while run.progress.step < run.steps:
            report = train_one_step(run)
            if report is None:
                break
            for callback in callbacks:
                callback.after_step(run, report)
        for callback in reversed(callbacks):
            callback.on_finish(run)
        if largest_of_all(run.problem is not None, run.engine.groups):
            raise UserError(gather_messages(run.problem, run.engine.groups))
    finally:
        for callback in callbacks:
            callback.close(run)
    return run.stopped_by


def train_one_step(run: Run) -> StepReport | None:
    """Read, agree to go on, and do one optimizer step.

    Returns:
        What happened; or None, before anything was done, when any rank was asked to stop.
    """
    started = time.perf_counter()
    batches, first_samples, unreadable = _read_batches(run)
    data_wait_s = time.perf_counter() - started
    if not agree_to_go_on(run, run.problem or unreadable):
        return None
    lr = learning_rate(run.progress.step, run.steps, run.config.optim)
    result = run.engine.train_step(batches, first_samples, lr)
    run.progress = _advanced(run)
    return StepReport(result, lr, time.perf_counter() - started, data_wait_s)


def _read_batches(run: Run) -> tuple[list[torch.Tensor], list[int], str | None]:
    """This rank's micro-batches of the next step, or what is wrong with them."""
    train, groups = run.config.train, run.engine.groups
    positions = micro_batch_indices(
        run.progress.consumed_samples,
        train.global_batch_size,
        train.micro_batch_size,
        groups.dp_rank,
        groups.dp_size,
    )
    samples = run.splits.train
    try:
        indices = samples.shuffled(np.concatenate(positions))
        ids = torch.from_numpy(load_batch(samples, indices, run.config.model.vocab_size))
    except (UserError, OSError) as error:
        return [], [], str(error)
    return list(ids.split(train.micro_batch_size)), [int(chunk[0]) for chunk in positions], None


def _advanced(run: Run) -> Progress:
    samples = run.config.train.global_batch_size
    return Progress(
        step=run.progress.step + 1,
        consumed_samples=run.progress.consumed_samples + samples,
        consumed_tokens=run.progress.consumed_tokens + samples * run.config.model.sequence_length,
    )
