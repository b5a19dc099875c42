"""Steps that changed nothing, and losses that jump."""

from __future__ import annotations

import dataclasses
import math

from megatron_lpa.checkpoint.progress import AT_START
from megatron_lpa.checkpoint.resume import Resumed
from megatron_lpa.parallel.agreement import gather_numbers
from megatron_lpa.train.callbacks.callback import Callback, RollBack, StepReport
from megatron_lpa.train.callbacks.metrics import Metrics
from megatron_lpa.train.state import Run


class Divergence(Callback):
    """Counts skipped steps and watches the loss. First in the order, so that no other sees a step that goes.

    The engine skips a step on all ranks alike when the global norm of the gradient is not finite. What is
    known of the steps before is in ``decisions`` and nowhere else: a checkpoint of this very step holds it.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.decisions = AT_START
        """What decides whether the run goes back; as of ``run.progress``, like everything that a checkpoint
        holds."""
        self._metrics = metrics
        self._skipped = 0

    def on_start(self, run: Run) -> None:
        """Take note of how many steps an earlier start skipped, and forget losses that are of no use any
        more."""
        self._go_on_from(run, run.resumed)

    def after_rollback(self, run: Run, resumed: Resumed) -> None:
        """Go on as after a start."""
        self._go_on_from(run, resumed)

    def _go_on_from(self, run: Run, resumed: Resumed | None) -> None:
        self._skipped = run.engine.skipped_steps
        self.decisions = (resumed.decisions if resumed else None) or AT_START
        if not run.config.train.loss_spike:  # a later start may ask for it, when these are of long ago
            self.decisions = dataclasses.replace(self.decisions, losses=())

    def after_step(self, run: Run, report: StepReport) -> None:
        """Look at one step.

        Raises:
            RollBack: on all ranks: too many skipped in a row, or a loss far above the last ones.
        """
        train, skipped = run.config.train, run.engine.skipped_steps
        if skipped > self._skipped:
            self._skipped = skipped
            self.decisions = self.decisions.after_skipped_step()
            self._tell_skipped(run)
            in_a_row = self.decisions.skipped_in_a_row
            if train.max_skipped_steps and in_a_row >= train.max_skipped_steps:
                raise RollBack(f"the gradient was not finite in {in_a_row} steps in a row", self.decisions)
            return
        loss = _agreed_loss(run, report) if train.loss_spike else None
        if loss is not None:
            self._compare(train.loss_spike, loss)
        if loss is not None or self.decisions.skipped_in_a_row:
            self.decisions = self.decisions.after_step(loss)

    def _compare(self, limit: float, loss: float) -> None:
        mean = self.decisions.mean_loss()
        if mean is not None and loss > mean + limit:
            raise RollBack(
                f"the loss is {loss:.4f}, more than train.loss_spike={limit:g} above the {mean:.4f} of the "
                f"last {len(self.decisions.losses)} steps",
                self.decisions,
            )

    def _tell_skipped(self, run: Run) -> None:
        end = run.progress.position
        message = (
            "the gradient is not finite: the step changed nothing, and samples "
            f"{end - run.config.train.global_batch_size:,} to {end - 1:,} of the order are passed over "
            f"({self.decisions.skipped_in_a_row} in a row, {self._skipped} in all)"
        )
        self._metrics.on_event(run, f"step {run.progress.step}: {message}")


def _agreed_loss(run: Run, report: StepReport) -> float:
    """The largest of all ranks' losses, infinite when any is not finite.

    Ranks of one tensor-parallel group may have sums that differ in the last bit. All decide by one number,
    which is the one that a checkpoint holds.
    """
    own = float(run.engine.mean_over_replicas(report.result.loss))
    losses = gather_numbers(own, run.engine.groups)
    return max(losses) if all(map(math.isfinite, losses)) else math.inf
