"""Which signals stop a run."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from megatron_lpa.train.stopping import STOPPING, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in STOPPING}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_signal_is_the_one_to_stop_for(signum: signal.Signals) -> None:
    stop = StopRequest().install()
    assert stop.signum() == 0
    signal.raise_signal(signum)
    signal.raise_signal(signal.SIGTERM)
    assert stop.signum() == signum


def test_a_closed_terminal_means_nothing_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest().install()
    signal.raise_signal(signal.SIGHUP)
    assert stop.signum() == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.raise_signal(signal.SIGTERM)
    assert stop.signum() == signal.SIGTERM
