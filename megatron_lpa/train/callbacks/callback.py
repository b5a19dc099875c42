"""What a callback may hook into. All ranks run the same callbacks in the same order."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lpa.checkpoint.progress import Decisions
from megatron_lpa.checkpoint.resume import Resumed
from megatron_lpa.engine.stepping import StepResult
from megatron_lpa.records import Record
from megatron_lpa.train.state import Run


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step.

    Args:
        result: loss and gradient norm.
        lr: learning rate used.
        step_s: wall time of the step, data included, in seconds.
        data_wait_s: part of it spent reading data.
    """

    result: StepResult
    lr: float
    step_s: float
    data_wait_s: float


SAID = "said"
"""Of an event that whoever made it has printed, as a "warning". The console leaves it out."""


class RollBack(Exception):
    """Raised by a callback, on all ranks alike: the run is to go back to its newest checkpoint.

    Args:
        reason: why, for the user.
        decisions: what the run knows of the steps before; ``Divergence.decisions`` is where they are kept.
    """

    def __init__(self, reason: str, decisions: Decisions) -> None:
        super().__init__(reason)
        self.decisions = decisions


class Callback:
    """Does nothing; override what is needed. Collectives are allowed in every hook but ``close``.

    ``after_step`` may raise ``RollBack``; callbacks after this one then do not see the step.
    """

    every: int = 1
    """``after_step`` is called after each step that this divides, and after the last; with 0 never. It may
    change during a run, on all ranks alike.
    """

    def on_start(self, run: Run) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """After optimizer steps, as ``every`` says; ``run.progress`` already counts this one."""

    def on_event(self, run: Run, message: str) -> None:
        """Something happened that belongs into the record of the run."""

    def before_rollback(self, run: Run) -> None:
        """Before the state of a checkpoint replaces the present one."""

    def after_rollback(self, run: Run, resumed: Resumed) -> None:
        """After it; ``resumed`` is what the run goes on from, and ``run.progress`` its."""

    def before_failure(self, run: Run) -> None:
        """Between two steps, when a problem that all ranks agreed on is about to end the run."""

    def on_finish(self, run: Run) -> None:
        """After the last step, or, with ``run.stopping.stopped_by`` above 0, after a signal."""

    def close(self, run: Run) -> None:
        """Last of all, also after an error; no collectives here."""


class Sink:
    """Somewhere records go, on rank 0.

    ``required`` sinks end the run when they cannot be written to; the others are switched off with a warning.
    """

    required = False

    def look(self, run: Run) -> None:
        """Before any sink opens: the files are still as an earlier start left them."""

    def open(self, run: Run) -> None:
        """Before the first record."""

    def write(self, record: Record) -> None:
        """One record of ``metrics.jsonl``."""

    def has_record(self, kind: str, step: int) -> bool:
        """Whether it holds a record of this kind and step, of whichever start; False where it does not
        know."""
        return False

    def flush(self) -> None:
        """Bring out what has been held back."""

    def rewind(self, run: Run) -> None:
        """The run went back to ``run.progress``: what was written of later steps will be written again."""

    def close(self) -> None:
        """After the last record."""
