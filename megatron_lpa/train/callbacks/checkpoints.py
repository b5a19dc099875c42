"""Checkpoints at intervals, at the end, and when a signal asks to stop."""

from __future__ import annotations

import logging

from megatron_lpa.checkpoint.manifest import note_validation
from megatron_lpa.checkpoint.progress import due_at
from megatron_lpa.checkpoint.resume import Resumed
from megatron_lpa.checkpoint.saving import CheckpointNotWritten, PendingCheckpoint, begin_save
from megatron_lpa.checkpoint.store import retention_of
from megatron_lpa.engine.engine_state import EngineState
from megatron_lpa.errors import UserError
from megatron_lpa.parallel.agreement import largest_of_all, together
from megatron_lpa.train.callbacks.callback import SAID, Callback, RollBack, StepReport
from megatron_lpa.train.callbacks.divergence import Divergence
from megatron_lpa.train.callbacks.evaluation import Evaluation
from megatron_lpa.train.callbacks.metrics import Metrics
from megatron_lpa.train.rollback import DIVERGED
from megatron_lpa.train.state import Run

logger = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Writes a checkpoint unless the newest one is of this very step.

    At most one is on its way. It is completed at the first step at which all processes have written theirs,
    before the next one is begun, or at the end.

    Args:
        metrics: takes records, and knows losses that are in none yet.
        evaluation: knows the validation loss of a step.
        divergence: knows what decides whether the run goes back.
    """

    def __init__(self, metrics: Metrics, evaluation: Evaluation, divergence: Divergence) -> None:
        self.metrics = metrics
        self.saved_step = -1
        """Step of the run's newest checkpoint; -1 when there is none."""
        self._evaluation, self._divergence = evaluation, divergence
        self._saving: PendingCheckpoint | None = None

    def on_start(self, run: Run) -> None:
        """Record what was noticed while resuming; a validation made up for counts for the checkpoint of its
        step."""
        self.every = run.config.train.checkpoint_interval
        if run.resumed is not None:
            self.saved_step = run.resumed.progress.step
            for note in run.resumed.notes:
                self._record(run, note)
        together(lambda: self._note_validation(run), run.engine.groups)

    def _note_validation(self, run: Run) -> None:
        loss = self._evaluation.validation_loss(self.saved_step)
        if run.is_main and run.resumed is not None and loss is not None:
            try:
                note_validation(run.resumed.checkpoint, loss)
            except OSError as error:
                self._record(
                    run, f"{run.resumed.checkpoint}: the validation loss cannot be added to it: {error}"
                )

    def after_step(self, run: Run, report: StepReport) -> None:
        """Save at the interval, and complete what is on its way.

        Raises:
            RollBack: on all ranks, when the state is not finite. Nothing is saved, so that a diverged model
            never takes the place of a good checkpoint.
            UserError: the checkpoint cannot be written and ``train.on_checkpoint_failure`` is ``stop``.
        """
        train = run.config.train
        due = due_at(run.progress.step, train.checkpoint_interval)
        last = run.progress.step == run.steps
        if self._saving is not None:
            unwritten = largest_of_all(not self._saving.written_here, run.engine.groups)
            if due or not unwritten:
                try:
                    self._complete(run)
                except CheckpointNotWritten as error:
                    # Of an earlier step, so not the last one of the run: that is still to come.
                    self._failed(run, error, "now" if due else self._at_the_interval(run))
        if due:
            try:
                self._start(run, train.checkpoint_overlap and not last)
            except CheckpointNotWritten as error:
                if last:
                    raise
                self._failed(run, error, f"in {train.checkpoint_interval} steps")

    def _at_the_interval(self, run: Run) -> str:
        interval = run.config.train.checkpoint_interval
        return f"in {interval - run.progress.step % interval} steps" if interval else "at the end"

    def _failed(self, run: Run, error: CheckpointNotWritten, next_attempt: str) -> None:
        if run.config.train.on_checkpoint_failure == "stop":
            raise error
        warning = (
            f"step {run.progress.step}: {error}; training goes on and the next attempt is {next_attempt}; "
            "what was trained since the last checkpoint would be lost (train.on_checkpoint_failure=stop "
            "ends the run instead)"
        )
        if run.is_main:
            logger.warning(warning)
        self._record(run, f"checkpoint failed: {warning}", **{SAID: "warning"})

    def before_failure(self, run: Run) -> None:
        """Save what there is, before a problem from outside ends the run."""
        if run.progress.step == 0:
            return
        try:
            self.on_finish(run)
        except UserError as error:
            self._record(run, f"checkpoint failed: {error}")

    def on_finish(self, run: Run) -> None:
        """Save whatever has not been saved.

        Raises:
            UserError: the state is not finite, and no next start would go back because of it: the run is
                complete, or has no checkpoint.
        """
        if self._saving is not None:
            try:
                self._complete(run)
            except CheckpointNotWritten as error:  # the one that follows decides
                self._record(run, f"checkpoint failed: {error}")
        try:
            self._start(run, overlap=False)
        except RollBack as problem:
            if run.stopping.stopped_by and self.saved_step >= 0:
                self._record(
                    run,
                    f"nothing is saved: {problem}; the next start goes on from step {self.saved_step}, and "
                    "goes back when it comes to a checkpoint like this",
                )
                return
            raise UserError(f"step {run.progress.step}: {problem}; {DIVERGED}") from problem

    def before_rollback(self, run: Run) -> None:
        """Complete the checkpoint on its way: it may be the newest there is."""
        if self._saving is not None:
            try:
                self._complete(run)
            except CheckpointNotWritten as error:
                self._record(run, f"checkpoint failed: {error}")

    def after_rollback(self, run: Run, resumed: Resumed) -> None:
        """What the run went back to is its newest checkpoint now."""
        self.saved_step = resumed.progress.step

    def _start(self, run: Run, overlap: bool) -> None:
        if self.saved_step == run.progress.step or run.has_lost_folder():
            return
        state = EngineState(run.engine)
        if largest_of_all(not state.is_finite(), state.groups):
            raise RollBack("the weights or AdamW's moments are not finite", self._divergence.decisions)
        run.enter("writing a checkpoint")
        train, step = run.config.train, run.progress.step
        self._saving = begin_save(
            state,
            run.checkpoints,
            run.progress,
            run.order,
            retention_of(train),
            self._evaluation.validation_loss(step),
            overlap,
            self._divergence.decisions,
            self.metrics.unrecorded(run),
            {
                "valid": run.splits.valid is not None and train.eval_interval > 0,
                "test": run.splits.test is not None,
            },
        )
        if overlap:
            self.every = 1  # looks after each step whether all have written theirs
        else:
            self._complete(run)

    def _complete(self, run: Run) -> None:
        saving, self._saving = self._saving, None
        assert saving is not None
        self.every = run.config.train.checkpoint_interval
        if run.has_lost_folder():  # another run may be writing there
            return
        run.enter("writing a checkpoint")
        path = saving.complete()
        self.saved_step = saving.progress.step
        self._record(run, f"checkpoint {path}", blocked_s=round(saving.blocked_s, 3))

    def _record(self, run: Run, message: str, **details: float | str) -> None:
        record = {"kind": "event", "step": run.progress.step, "message": message, **details}
        self.metrics.emit(run, record)
