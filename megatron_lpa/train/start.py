"""One run from a config to its end: processes, data, model, resume, loop."""

from __future__ import annotations

import importlib.util
import logging
import math
import socket
from pathlib import Path

from megatron_lpa.checkpoint.manifest import checkpoint_folders
from megatron_lpa.checkpoint.progress import Progress, SampleOrder
from megatron_lpa.checkpoint.resume import Resumed, load_newest
from megatron_lpa.checkpoint.saving import CheckpointNotWritten
from megatron_lpa.checkpoint.store import damaged_folders, give_names_back, has_checkpoints, tidy
from megatron_lpa.config import RunConfig, save_config
from megatron_lpa.data.splits import Splits
from megatron_lpa.data.tokenizers.opening import load_tokenizer, save_tokenizer
from megatron_lpa.engine.build import build_engine
from megatron_lpa.engine.engine_state import EngineState
from megatron_lpa.engine.joining import (
    collective_timeout,
    explained_losses,
    start_distributed,
    stop_distributed,
)
from megatron_lpa.engine.stepping import Engine
from megatron_lpa.errors import RankError, TryAgain, UserError
from megatron_lpa.files import exists, patiently
from megatron_lpa.parallel.agreement import from_first, gather_json, largest_of_all, together
from megatron_lpa.parallel.disagreement import disagreement
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.launcher import tell_launcher
from megatron_lpa.parallel.meeting import Meeting, meet
from megatron_lpa.parallel.place import place_from_environment
from megatron_lpa.planning.flops import flops_per_token_training
from megatron_lpa.planning.parameters import count_parameters
from megatron_lpa.run_folder import CHECKPOINTS, CONFIG, TOKENIZER, refuse_links, refuse_unwritable
from megatron_lpa.train.alike import data_facts, sample_order, start_facts
from megatron_lpa.train.callbacks.callback import Callback, Sink
from megatron_lpa.train.callbacks.checkpoints import Checkpoints
from megatron_lpa.train.callbacks.console import Console
from megatron_lpa.train.callbacks.divergence import Divergence
from megatron_lpa.train.callbacks.evaluation import Evaluation
from megatron_lpa.train.callbacks.metrics import Metrics
from megatron_lpa.train.callbacks.sinks import MetricsFile
from megatron_lpa.train.callbacks.tensorboard import TensorBoard
from megatron_lpa.train.callbacks.weights_and_biases import NO_WANDB, WandB
from megatron_lpa.train.changes import changed_settings, learning_rate_jump, settings_of
from megatron_lpa.train.complete import refuse_other_end, why_nothing_to_do
from megatron_lpa.train.data import check_own_tokenizer, check_tokenizer, open_data
from megatron_lpa.train.loop import train
from megatron_lpa.train.rollback import check_passed_over, recall
from megatron_lpa.train.run_lock import RunLock, lock_run
from megatron_lpa.train.schedule import total_steps
from megatron_lpa.train.state import Run
from megatron_lpa.train.stopping import Stopping, StopRequest, stopped_line
from megatron_lpa.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

BEFORE_LIMIT = 0.9
"""Of ``train.start_timeout_s``, for waits at the start that have words of their own when they end."""


def run_training(config: RunConfig, watchdog: Watchdog | None = None, stop: StopRequest | None = None) -> int:
    """Train as ``config`` says in all processes of this launch.

    Args:
        config: validated for the number of processes.
        watchdog: that watches this process already; None watches nothing.
        stop: made at the first line of the process; None makes one.

    Returns:
        0 when complete, the signal's number when stopped by one.

    Raises:
        UserError: one message for all ranks, which rank 0 is to print; a TryAgain where that may help.
        RankError: what this rank has to print itself.
    """
    watchdog = watchdog or Watchdog()
    place = place_from_environment()
    watchdog.enter("reading code and configuration")
    facts = start_facts(config)
    watchdog.join_board(None, place.world_size)
    with explained_losses():
        meeting = meet(place, facts, config.train.start_timeout_s, watchdog.enter, _note)
        watchdog.join_board(meeting.connection(), place.world_size)
    try:
        return _train_together(config, meeting, watchdog, stop or StopRequest())
    except RankError:
        raise
    except UserError as error:
        if meeting.told_by_first(str(error)):
            error.known_to_all = True
            raise
        # Rank 0 knows nothing of it.
        raise RankError(f"{place}: {error}", error.exit_code) from error


def _note(line: str) -> None:
    logger.info(f"note: {line}")


def _train_together(config: RunConfig, meeting: Meeting, watchdog: Watchdog, stop: StopRequest) -> int:
    with explained_losses():
        timeout = collective_timeout(config.train.step_timeout_s, config.train.start_timeout_s)
        groups = start_distributed(
            config.parallel.tensor_parallel_size, timeout, meeting, watchdog.wait, watchdog.enter
        )
        run = _prepare(config, groups, watchdog, stop)
        # Until here a signal ends the process at once: there is nothing to save.
        stop.install()
        signum, saved_step = 0, -1
        try:
            if run is not None:
                callbacks, checkpoints = _callbacks(config)
                signum = train(run, callbacks)
                saved_step = checkpoints.saved_step
        except CheckpointNotWritten as error:
            if config.train.on_checkpoint_failure == "stop":
                raise
            raise TryAgain(str(error)) from error  # as the config says: a disk may have room again
        watchdog.enter("ending")
        largest_of_all(0, groups)  # nobody leaves while another rank is still talking to it
        stop_distributed()
    if run is not None and signum:
        line = stopped_line(signum, run.progress.step, saved_step)
        tell_launcher(line)
        if run.is_main:
            print(line, flush=True)
    return signum


def _prepare(config: RunConfig, groups: ParallelGroups, watchdog: Watchdog, stop: StopRequest) -> Run | None:
    """Everything before the first step; None when nothing is left to do.

    Until the configuration is written, a start that is refused has changed nothing in the run folder.
    """
    assert config.logging.name is not None
    folder = Path(config.logging.run_dir) / config.logging.name
    watchdog.enter("opening data")
    most_s = BEFORE_LIMIT * config.train.start_timeout_s or math.inf
    splits: Splits = together(lambda: open_data(config, most_s), groups)
    order = together(lambda: sample_order(config, splits), groups)
    _compare_data(splits, order, groups)
    watchdog.enter("looking into the run folder")
    steps = total_steps(config.train, config.model, splits.train.num_samples)
    together(lambda: _check_start(folder, config, splits, groups), groups)
    if _has_nothing_to_do(config, folder, splits, order, steps, groups):
        return None
    lock = together(lambda: _own_folder(folder, config, groups), groups)
    watchdog.write_stacks_to(folder)
    try:
        watchdog.enter("building the model")
        engine = build_engine(config, groups)
        resumed = _resume(config, folder, engine, order, steps, watchdog)
    except BaseException:
        if lock is not None:
            lock.leave()
        raise
    run = Run(
        config,
        folder,
        engine,
        splits,
        order,
        steps,
        Stopping(groups, stop),
        Progress() if resumed is None else resumed.progress,
        lock,
        resumed,
        () if resumed is None else tuple(_changes(config, resumed, order)),
        watchdog,
    )
    run.enter("writing the configuration")
    together(lambda: _write_folder(run), groups)
    if run.is_main:
        _introduce(run)
    return run


def _has_nothing_to_do(
    config: RunConfig, folder: Path, splits: Splits, order: SampleOrder, steps: int, groups: ParallelGroups
) -> bool:
    """Whether the run is complete; rank 0 tells the user. Before anything is made, locked or loaded.

    Raises:
        UserError, TryAgain: on all ranks, as ``why_nothing_to_do``.
    """

    def look() -> str | None:
        return why_nothing_to_do(config, folder, splits, order, steps) if groups.rank == 0 else None

    reason = from_first(together(look, groups), groups)
    if reason is not None and groups.rank == 0:
        print(reason, flush=True)
    return reason is not None


def _resume(
    config: RunConfig, folder: Path, engine: Engine, order: SampleOrder, steps: int, watchdog: Watchdog
) -> Resumed | None:
    """Continue from the newest intact checkpoint, if any. What a killed process left goes after that.

    Raises:
        UserError, TryAgain: on all ranks, as ``load_newest`` and ``recall``.
    """
    groups, checkpoints, resumed = engine.groups, folder / CHECKPOINTS, None
    # Every rank continues from what rank 0 found, however fresh its own view of the folder is.
    found = from_first(
        [path.name for path in together(lambda: _find_checkpoints(folder, groups), groups)], groups
    )
    if found:
        watchdog.enter("loading a checkpoint", 0)
        loaded = load_newest(
            EngineState(engine),
            [checkpoints / name for name in found],
            order,
            lambda each: refuse_other_end(folder, config, each, steps, order.samples_per_epoch),
        )
        resumed = recall(loaded, groups)
    together(lambda: tidy(checkpoints) if groups.rank == 0 else None, groups)
    return resumed


def _changes(config: RunConfig, resumed: Resumed, order: SampleOrder) -> list[str]:
    """What is different from here on, for the user and the run's record."""
    earlier = settings_of(resumed.config, resumed.checkpoint.name)
    if earlier is None:
        return []
    notes = [f"since {resumed.checkpoint.name}, {line}" for line in changed_settings(earlier, config)]
    jump = learning_rate_jump(earlier, config, resumed.progress.step, order.samples_per_epoch)
    return notes if jump is None else [*notes, jump]


def _compare_data(splits: Splits, order: SampleOrder, groups: ParallelGroups) -> None:
    """Compare what ranks have opened: the same path may lead to other files on another machine.

    Raises:
        UserError: on all ranks, with the ranks, hosts and data that differ.
    """
    own = {"host": socket.gethostname(), "facts": data_facts(splits, order)}
    seen = gather_json(own, groups)
    if message := disagreement([each["facts"] for each in seen], [each["host"] for each in seen]):
        raise UserError(message)


def _check_resume(config: RunConfig, folder: Path) -> None:
    """Compare ``train.resume`` with what is there, before anything is made.

    Raises:
        UserError: they do not fit.
    """
    checkpoints = folder / CHECKPOINTS
    there = has_checkpoints(checkpoints)
    if config.train.resume == "never" and there:
        newest = [*damaged_folders(checkpoints), *checkpoint_folders(checkpoints)][-1:]
        raise UserError(
            f"{folder} already holds {newest[0].name if newest else 'a checkpoint'}, and train.resume=never; "
            "choose another logging.name, delete the folder, or set train.resume=auto to continue"
        )
    if config.train.resume == "must" and not there:
        raise UserError(
            f"{checkpoints} holds no complete checkpoint, and train.resume=must; check logging.run_dir and "
            "logging.name, or set train.resume=auto to start"
        )


def _find_checkpoints(folder: Path, groups: ParallelGroups) -> list[Path]:
    """What there is to continue from, oldest first, on rank 0.

    Raises:
        UserError: only checkpoints that were found damaged earlier. To start again from nothing without being
            told so would hide the loss.
    """
    if groups.rank != 0:
        return []
    checkpoints = folder / CHECKPOINTS
    give_names_back(checkpoints)
    found, damaged = checkpoint_folders(checkpoints), damaged_folders(checkpoints)
    if damaged and not found:
        raise UserError(
            f"{checkpoints} holds only damaged checkpoints ({', '.join(path.name for path in damaged)}); "
            "bring one back from a copy, or start anew: choose another logging.name, or delete them"
        )
    return found


def _check_start(folder: Path, config: RunConfig, splits: Splits, groups: ParallelGroups) -> None:
    """What can be refused before the run folder is made or locked.

    Raises:
        UserError: ``train.resume`` does not fit what is there, the tokenizer is not the run's or does not fit
            data and model, the folder has links in it or may not be written, or a package is missing.
        TryAgain: the disk does not answer.
    """
    if groups.rank != 0:
        return
    _check_resume(config, folder)
    refuse_links(folder)
    refuse_unwritable(folder)
    if config.logging.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(NO_WANDB)
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_tokenizer(tokenizer, splits, config)
        if has_checkpoints(folder / CHECKPOINTS):
            check_own_tokenizer(tokenizer, folder / TOKENIZER, config)
    check_passed_over(folder / CHECKPOINTS)


def _own_folder(folder: Path, config: RunConfig, groups: ParallelGroups) -> RunLock | None:
    """Make the run folder ours. Nothing that was in it is changed.

    Returns:
        The lock, on rank 0. It goes with the process, however it ends.

    Raises:
        UserError: the folder cannot be made.
        TryAgain: another run is writing the folder, or it cannot be written.
    """
    if groups.rank != 0:
        return None
    missing = [path for path in (folder, *folder.parents) if not exists(path)]
    try:
        patiently(lambda: folder.mkdir(parents=True, exist_ok=True), folder, "made")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another logging.run_dir"
        ) from error
    most_s = BEFORE_LIMIT * config.train.start_timeout_s or math.inf
    lock = lock_run(folder, config.train.lock_wait_s, most_s, missing)
    try:
        _check_resume(config, folder)  # another run may have been writing here until now
    except BaseException:
        lock.leave()
        raise
    return lock


def _write_folder(run: Run) -> None:
    """Write what a run folder holds from the start: the configuration, and a copy of the tokenizer."""
    if not run.is_main:
        return
    patiently(lambda: run.checkpoints.mkdir(exist_ok=True), run.checkpoints, "made")
    if run.config.data.tokenizer is not None:
        save_tokenizer(run.config.data.tokenizer, run.folder / TOKENIZER)
    save_config(run.config, run.folder / CONFIG)


def _introduce(run: Run) -> None:
    config, groups = run.config, run.engine.groups
    count = count_parameters(config.model)
    alone = (
        ""
        if run.engine.partition_stage == run.engine.zero_stage
        else " (one replica: nothing is partitioned)"
    )
    print(
        f"{run.folder}: {count.total / 1e6:,.1f} M parameters, "
        f"{flops_per_token_training(config.model) / 1e6:,.0f} MFLOP per token; {groups.world_size} "
        f"process{'es' * (groups.world_size > 1)} = tensor parallel {groups.tp_size} x data parallel "
        f"{groups.dp_size}, ZeRO-{run.engine.zero_stage}{alone}, {config.train.precision}; {run.steps:,} "
        f"steps of {config.train.global_batch_size} x {config.model.sequence_length} tokens",
        flush=True,
    )
    if config.train.epochs is not None and config.optim.warmup_steps > run.steps:
        print(f"warning: the run ends after {run.steps} steps, within optim.warmup_steps", flush=True)
    held = [split for split in (run.splits.train, run.splits.valid, run.splits.test) if split is not None]
    sizes = (
        f"{s.name} {s.num_samples:,} samples ({_amount(s.num_samples * s.sequence_length)} tokens)"
        for s in held
    )
    print(f"data: {', '.join(sizes)}", flush=True)
    for note in run.splits.notes:
        print(f"note: {note}", flush=True)
    if run.resumed is not None:
        print(f"resuming from {run.resumed.checkpoint} at step {run.progress.step:,}", flush=True)
        for change in run.changes:
            print(f"note: {change}", flush=True)


def _amount(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number:,}"


def _callbacks(config: RunConfig) -> tuple[list[Callback], Checkpoints]:
    sinks: list[Sink] = [MetricsFile(), Console()]
    if config.logging.tensorboard:
        sinks.append(TensorBoard())
    if config.logging.wandb != "off":
        sinks.append(WandB(config.logging.wandb))
    metrics = Metrics(sinks)
    divergence, evaluation = Divergence(metrics), Evaluation(metrics)
    checkpoints = Checkpoints(metrics, evaluation, divergence)
    return [divergence, metrics, evaluation, checkpoints], checkpoints
