"""TensorBoard's event files."""

from __future__ import annotations

from typing import Any

from megatron_lpa.records import Record
from megatron_lpa.run_folder import TENSORBOARD
from megatron_lpa.train.callbacks.callback import Sink
from megatron_lpa.train.callbacks.views import numbers
from megatron_lpa.train.state import Run


class TensorBoard(Sink):
    """Event files in ``<run folder>/tensorboard``. What is shown is what ``metrics.jsonl`` says.

    A new file hides what older ones say of the step it begins with and of later ones.
    """

    def __init__(self) -> None:
        self._writer: Any = None

    def open(self, run: Run) -> None:
        """Open the writer; earlier events after the resumed step are hidden."""
        self._begin(run)

    def _begin(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / TENSORBOARD), purge_step=run.progress.step + 1)

    def write(self, record: Record) -> None:
        """Every number under ``<kind>/<name>``, at once: a run that is killed goes on behind what was
        written."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"], record.get("time"))
        self._writer.flush()

    def rewind(self, run: Run) -> None:
        """Go on in another file, which hides what is said of later steps."""
        self._writer.close()
        self._begin(run)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
