"""What views of ``metrics.jsonl`` have in common: they show what it says, also after steps have come
again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from megatron_lpa.records import NoRecord, Record, is_finite_number, read_lines
from megatron_lpa.run_folder import METRICS
from megatron_lpa.train.state import Run

_POSITION = ("step", "time")


def numbers(record: Record) -> dict[str, float]:
    """The numeric fields of a record, without its position."""
    return {
        name: value for name, value in record.items() if is_finite_number(value) and name not in _POSITION
    }


def history(run: Run) -> Iterator[Record]:
    """The records up to ``run.progress`` that are in the metrics file."""
    return (record for record in _records(run) if record["step"] <= run.progress.step)


def any_record(run: Run, wanted: Callable[[Record], bool]) -> bool:
    """Whether the metrics file has one that is wanted, and that views show something of."""
    return any(wanted(record) and bool(numbers(record)) for record in _records(run))


def _records(run: Run) -> Iterator[Record]:
    with contextlib.suppress(FileNotFoundError):
        for line in read_lines(run.folder / METRICS):
            with contextlib.suppress(NoRecord):
                yield line.record()
