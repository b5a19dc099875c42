"""Signals become a wish to stop, which the loop reads at the end of each step."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; later ones change nothing.

    ``signum`` is 0 until one arrives. The exit code of a run stopped by a signal is ``128 + signum``, as
    shells have it.
    """

    def __init__(self) -> None:
        self.signum = 0

    def install(self) -> StopRequest:
        """Take over both signals of this process."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._remember)
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum = signum
