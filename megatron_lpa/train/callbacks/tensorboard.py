"""TensorBoard's event files."""

from __future__ import annotations

from typing import Any

from megatron_lpa.records import Record
from megatron_lpa.run_folder import TENSORBOARD
from megatron_lpa.train.callbacks.base import Sink
from megatron_lpa.train.callbacks.views import any_record, history, numbers
from megatron_lpa.train.state import Run

SUFFIX = ".records"
"""Of the names of event files that hold nothing but records."""


class TensorBoard(Sink):
    """Event files in ``<run folder>/tensorboard``. What is shown is what ``metrics.jsonl`` says.

    A new file hides what older ones say of the step it begins with and of later ones. Where a resumed run drops records
    of earlier steps, which are those of a final test, the files are made anew.
    """

    def __init__(self) -> None:
        self._writer: Any = None
        self._anew = False

    def look(self, run: Run) -> None:
        """See whether records go that are not of later steps."""
        self._anew = any_record(
            run, lambda record: record["kind"] == "test" and record["step"] <= run.progress.step
        )

    def open(self, run: Run) -> None:
        """Open the writer; earlier events that the metrics file does not have any more are hidden."""
        if not self._anew:
            self._begin(run, run.progress.step + 1)
            return
        for path in (run.folder / TENSORBOARD).glob(f"events.out.tfevents.*{SUFFIX}"):
            path.unlink()
        self._begin(run, 0)
        for record in history(run):
            self.write(record)

    def _begin(self, run: Run, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / TENSORBOARD), purge_step=step, filename_suffix=SUFFIX)

    def write(self, record: Record) -> None:
        """Every number under ``<kind>/<name>``."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"], record.get("time"))

    def flush(self) -> None:
        """Bring out what has been held back."""
        self._writer.flush()

    def rewind(self, run: Run) -> None:
        """Go on in another file, which hides what is said of later steps."""
        self._writer.close()
        self._begin(run, run.progress.step + 1)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
