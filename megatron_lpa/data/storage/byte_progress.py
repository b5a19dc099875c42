"""Progress of a long pass over files."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)


class ByteProgress:
    """Says on stderr how far a pass has come, at most every ``interval_s``; a short pass says nothing.

    Args:
        what: begins every line.
        total_bytes: of the whole pass.
        interval_s: seconds between lines.
    """

    def __init__(self, what: str, total_bytes: int, interval_s: float = 10.0) -> None:
        self._what, self._total_bytes, self._interval_s = what, total_bytes, interval_s
        self._done_bytes = 0
        self._start = self._last = time.monotonic()

    def add(self, count_bytes: int) -> None:
        self._done_bytes += count_bytes
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            rate = self._done_bytes / (now - self._start)
            logger.info(
                f"{self._what}: {self._done_bytes / 1e9:.1f} of {self._total_bytes / 1e9:.1f} GB, "
                f"{rate / 1e6:.0f} MB/s"
            )
