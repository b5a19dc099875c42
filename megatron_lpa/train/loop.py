"""The training loop. Everything that is not the step itself is a callback."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.data.batches import load_batch, micro_batch_indices
from megatron_lpa.errors import AgreedProblem, UserError
from megatron_lpa.train.callbacks.callback import Callback, RollBack, StepReport
from megatron_lpa.train.rollback import roll_back
from megatron_lpa.train.schedule import is_due, learning_rate
from megatron_lpa.train.state import Run
from megatron_lpa.train.watchdog import Whereabouts


def train(run: Run, callbacks: Sequence[Callback]) -> int:
    """Train until the last step or a signal. Every rank calls it.

    Callbacks run in order, and in reverse order at the end, so that the first one sees everything.

    Returns:
        0 when the run is complete, the signal's number when it was asked to stop.

    Raises:
        AgreedProblem: on all ranks, when any rank cannot read its data, or write its records while it trains.
        TryAgain: on all ranks, when records cannot be written at the end.
        UserError: on all ranks, when the run folder is gone by then.
    """
    try:
        for callback in callbacks:
            run.enter(f"starting {type(callback).__name__}")
            callback.on_start(run)
        run.watchdog.limit(run.config.train.step_timeout_s, "train.step_timeout_s")
        try:
            _train_all_steps(run, callbacks)
        except AgreedProblem:
            # Raised on all ranks at one place between two steps, so what has been trained can be saved.
            for callback in callbacks:
                run.enter(f"in {type(callback).__name__}")
                callback.before_failure(run)
            raise
        for callback in reversed(callbacks):
            run.enter(f"in {type(callback).__name__}")
            callback.on_finish(run)
        run.stopping.raise_problems()
    finally:
        for callback in callbacks:
            run.enter(f"closing {type(callback).__name__}")
            callback.close(run)
    return run.stopping.stopped_by


def _train_all_steps(run: Run, callbacks: Sequence[Callback]) -> None:
    while run.progress.step < run.steps:
        report = train_one_step(run)
        if report is None:
            return
        try:
            for callback in callbacks:
                if is_due(callback.every, run.progress.step, run.steps):
                    run.watchdog.where = Whereabouts(f"in {type(callback).__name__}", run.progress.step)
                    callback.after_step(run, report)
        except RollBack as request:
            _go_back(run, callbacks, request)


def _go_back(run: Run, callbacks: Sequence[Callback], request: RollBack) -> None:
    # What is in the folder may be another run's by now. The next step is agreed on first, and that ends this
    # run.
    if run.has_lost_folder():
        return
    bad = run.progress
    for callback in callbacks:
        callback.before_rollback(run)
    resumed = roll_back(run, str(request), request.decisions)
    run.progress = resumed.progress
    for callback in callbacks:
        callback.after_rollback(run, resumed)
    message = (
        f"went back to {resumed.checkpoint.name} because of step {bad.step}: {request}; training goes on "
        f"behind sample {bad.position - 1:,} of the order"
    )
    for note in (*resumed.notes, message):
        for callback in callbacks:
            callback.on_event(run, note)


def train_one_step(run: Run) -> StepReport | None:
    """Read, agree to go on, and do one optimizer step.

    Returns:
        What happened; or None, before anything was done, when any rank was asked to stop.
    """
    started = time.perf_counter()
    step, stopping = run.progress.step, run.stopping
    # Attributes and no calls: what has nothing to do in a step is not entered.
    run.watchdog.where = Whereabouts("reading data", step)
    batches, first_samples, unreadable = _read_batches(run)
    data_wait_s = time.perf_counter() - started
    if run.lock is not None and time.monotonic() >= run.lock.next_look_s:
        stopping.report(run.lock.lost())
    if not stopping.agree_to_go_on(stopping.problem or unreadable):
        return None
    run.watchdog.where = Whereabouts("computing", step)
    lr = learning_rate(step, run.steps, run.config.optim)
    result = run.engine.train_step(batches, first_samples, lr)
    run.progress = _advanced(run)
    return StepReport(result, lr, time.perf_counter() - started, data_wait_s)


def _read_batches(run: Run) -> tuple[list[torch.Tensor], list[int], Exception | None]:
    """This rank's micro-batches of the next step, or what is wrong with them."""
    train, groups, progress = run.config.train, run.engine.groups, run.progress
    positions = micro_batch_indices(
        progress.consumed_samples + progress.skipped_samples,
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
        return [], [], error
    return list(ids.split(train.micro_batch_size)), [int(chunk[0]) for chunk in positions], None


def _advanced(run: Run) -> Progress:
    samples = run.config.train.global_batch_size
    return replace(
        run.progress,
        step=run.progress.step + 1,
        consumed_samples=run.progress.consumed_samples + samples,
        consumed_tokens=run.progress.consumed_tokens + samples * run.config.model.sequence_length,
    )
