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

from megatron_lpa.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def _start_worker(initialize: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    initialize(*arguments)


def _die_with_parent() -> None:
    # Workers hold both ends of the task queue, so nothing else tells them that the parent was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    initialize: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Generator[Result, None, None]:
    """Yields ``function(item)`` for every item, in order, computed by ``workers`` processes.

    Items are drawn only as results are taken, so at most ``2 * workers + 2`` are in memory. Processes are
    spawned, not forked: tokenizers and readers own threads that a fork would break.

    Args:
        function: a module-level function.
        items: picklable items.
        workers: processes, 1 or more.
        initialize: called once in every process with ``arguments``.
        arguments: picklable arguments of ``initialize``.

    Raises:
        UserError: a worker raised it, or a worker died.
    """
    assert workers >= 1
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (initialize, arguments)
    )
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 2 * workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, most likely for want of memory; use fewer --workers or more memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
