"""Steps that changed nothing, and losses that jump."""

from __future__ import annotations

from collections import deque

from megatron_lpa.parallel.agreement import largest_of_all
from megatron_lpa.train.callbacks.base import Callback, RollBack, StepReport
from megatron_lpa.train.callbacks.metrics import Metrics
from megatron_lpa.train.state import Run

WINDOW_STEPS = 50
"""A loss is compared with the mean of so many before it."""

FEWEST_STEPS = 10
"""Before so many there is nothing to compare with."""


class Divergence(Callback):
    """Counts skipped steps and watches the loss. First in the order, so that no other sees a step that goes.

    The engine skips a step on all ranks alike when the global norm of the gradient is not finite.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._skipped = 0
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)

    def on_start(self, run: Run) -> None:
        """Take note of how many steps an earlier start skipped."""
        self._skipped = run.engine.skipped_steps

    def after_rollback(self, run: Run) -> None:
        """Start anew; the count of skipped steps is the checkpoint's."""
        self._skipped, self._in_a_row = run.engine.skipped_steps, 0
        self._losses.clear()

    def after_step(self, run: Run, report: StepReport) -> None:
        """Look at one step.

        Raises:
            RollBack: on all ranks: too many skipped in a row, or a loss far above the last ones.
        """
        train, skipped = run.config.train, run.engine.skipped_steps
        if skipped > self._skipped:
            self._skipped = skipped
            self._in_a_row += 1
            self._tell_skipped(run)
            if train.max_skipped_steps and self._in_a_row >= train.max_skipped_steps:
                raise RollBack(f"the gradient was not finite in {self._in_a_row} steps in a row")
            return
        self._in_a_row = 0
        if train.loss_spike:
            self._compare(run, float(run.engine.mean_over_replicas(report.result.loss)))

    def _tell_skipped(self, run: Run) -> None:
        end = run.progress.position
        message = (
            f"the gradient is not finite: the step changed nothing, and samples {end - run.config.train.global_batch_size:,} "
            f"to {end - 1:,} of the order are passed over ({self._in_a_row} in a row, {self._skipped} in all)"
        )
        self._metrics.on_event(run, f"step {run.progress.step}: {message}")

    def _compare(self, run: Run, loss: float) -> None:
        limit = run.config.train.loss_spike
        if len(self._losses) >= FEWEST_STEPS:
            mean = sum(self._losses) / len(self._losses)
            # Agreed on: ranks of one tensor-parallel group may have sums that differ in the last bit.
            if largest_of_all(not loss <= mean + limit, run.engine.groups):
                raise RollBack(
                    f"the loss is {loss:.4f}, more than train.loss_spike={limit:g} above the {mean:.4f} of the last "
                    f"{len(self._losses)} steps"
                )
        self._losses.append(loss)
