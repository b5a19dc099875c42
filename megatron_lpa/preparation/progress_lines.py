"""Progress of preprocessing, as lines on stderr."""

from __future__ import annotations

import logging
import time

from megatron_lpa.preparation.ledger import State

logger = logging.getLogger(__name__)


class ProgressLines:
    """Prints a line whenever another ``interval`` documents are done; never when it is 0."""

    def __init__(self, interval: int, state: State) -> None:
        counts = state.counts[0]
        self._interval = interval
        self._next = counts.documents + interval
        self._start = (time.monotonic(), counts.documents, counts.bytes_text)

    def show(self, state: State) -> None:
        documents = state.counts[0].documents
        if self._interval and documents >= self._next:
            self._next = documents - documents % self._interval + self._interval
            self.report(state)

    def report(self, state: State) -> None:
        counts = state.counts[0]
        started, documents, bytes_text = self._start
        seconds = max(time.monotonic() - started, 1e-9)
        logger.info(
            f"{counts.documents} documents, {(counts.documents - documents) / seconds:.0f} documents/s, "
            f"{(counts.bytes_text - bytes_text) / seconds / 1e6:.2f} MB/s"
        )
