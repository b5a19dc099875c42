"""Work over processes: results in order, bounded memory, errors that arrive."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from megatron_lpa.errors import UserError
from megatron_lpa.preparation import ordered_pool
from megatron_lpa.preparation.ordered_pool import ordered_map

_offset = 0


def set_offset(offset: int) -> None:
    global _offset
    _offset = offset


def slow_for_even(number: int) -> int:
    if number == 25:
        raise UserError("number 25")
    time.sleep(0.02 if number % 2 == 0 else 0)
    return number + _offset


def test_results_come_in_order_and_items_are_drawn_only_when_needed() -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for number in range(20):
            drawn += 1
            yield number

    taken = 0
    for result in ordered_map(slow_for_even, items(), 2, set_offset, (100,)):
        assert result == 100 + taken
        taken += 1
        assert drawn - taken <= 2 * 2 + 2
    assert taken == 20


def test_an_error_arrives_after_the_results_before_it() -> None:
    results = ordered_map(slow_for_even, range(20, 40), 2, set_offset, (0,))
    assert [next(results) for _ in range(5)] == [20, 21, 22, 23, 24]
    with pytest.raises(UserError, match=r"^number 25$"):
        next(results)


def test_large_items_are_few_in_memory() -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for number in range(10):
            drawn += 1
            yield number

    taken = 0
    size = ordered_pool.MAX_PENDING_BYTES // 2 + 1
    for _ in ordered_map(slow_for_even, items(), 2, set_offset, (0,), lambda _: size):
        taken += 1
        assert drawn - taken <= 1
    assert taken == 10


def refuse(_: int) -> None:
    raise UserError("the tokenizer changed")


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(UserError, match=r"^the tokenizer changed$"):
        list(ordered_map(slow_for_even, range(3), 2, refuse, (0,)))


def test_a_signal_that_another_thread_gets_waits_until_a_worker_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mask of this thread does not hold it back: Python runs its handler here, whichever thread got
    it."""
    events: list[str] = []
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()

    class Pool:
        def submit(self, *_: object) -> str:
            signal.pthread_kill(other.ident or 0, signal.SIGTERM)
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:  # handlers run between instructions
                pass
            events.append("started")
            return "future"

    before = signal.signal(signal.SIGTERM, lambda *_: events.append("handled"))
    try:
        ordered_pool._submit(Pool(), slow_for_even, 1)  # type: ignore[arg-type]
        assert events == ["started", "handled"]
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        done.set()
        other.join()
        signal.signal(signal.SIGTERM, before)
