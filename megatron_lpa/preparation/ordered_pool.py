"""Work spread over processes, results in the order of the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from megatron_lpa.errors import TryAgain

MAX_PENDING_BYTES = 1 << 26
Item = TypeVar("Item")
Result = TypeVar("Result")


_problem: BaseException | None = None  # what kept this worker process from starting well


def _start_worker(initialize: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    global _problem
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C and a closed terminal are the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # held back while this process was started
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        initialize(*arguments)
    except Exception as error:  # raised here it would be lost, and only "a worker died" be known
        _problem = error


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    if _problem is not None:
        raise _problem
    return function(item)


def _die_with_parent() -> None:
    # Workers hold both ends of the task queue, so nothing else tells them that the parent was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item) -> Future[Result]:
    """Submits with signals held back: a process that is being started has to get all that its parent tells
    it.

    It inherits the mask, and leaves Ctrl-C to its parent. The mask alone does not hold back this process's
    own handlers: the system may give a signal to another thread, and Python then runs its handler here.
    """
    if threading.current_thread() is not threading.main_thread():
        return pool.submit(_call, function, item)
    came: list[int] = []
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        for number, handler in held.items():
            if callable(handler):
                signal.signal(number, lambda which, _frame: came.append(which))
        return pool.submit(_call, function, item)
    finally:
        for number, handler in held.items():
            if callable(handler):
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            signal.raise_signal(came[0])


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    initialize: Callable[..., None],
    arguments: tuple[Any, ...],
    size_bytes: Callable[[Item], int] = lambda item: 0,
) -> Generator[Result, None, None]:
    """Yields ``function(item)`` for every item, in order, computed by ``workers`` processes.

    Items are drawn only as results are taken, so at most ``2 * workers + 2`` are in memory, and of large ones
    no more than fit ``MAX_PENDING_BYTES``, but always one. Processes are spawned, not forked: tokenizers and
    readers own threads that a fork would break.

    Args:
        function: a module-level function.
        items: picklable items.
        workers: processes, 1 or more.
        initialize: called once in every process with ``arguments``.
        arguments: picklable arguments of ``initialize``.
        size_bytes: how large an item is.

    Raises:
        UserError: a worker raised it.
        TryAgain: a worker died.
    """
    assert workers >= 1
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (initialize, arguments)
    )
    pending: deque[tuple[Future[Result], int]] = deque()
    pending_bytes = 0
    try:
        for item in items:
            size = size_bytes(item)
            while pending and (
                len(pending) >= 2 * workers + 2
                or pending_bytes + size > max(MAX_PENDING_BYTES, workers << 22)
            ):
                future, done_bytes = pending.popleft()
                pending_bytes -= done_bytes
                yield future.result()
            pending.append((_submit(pool, function, item), size))
            pending_bytes += size
            del item
        while pending:
            yield pending.popleft()[0].result()
    except BrokenProcessPool as error:
        raise TryAgain(
            "a worker process died, most likely for want of memory; use fewer --workers or more memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
