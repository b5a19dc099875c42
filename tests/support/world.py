"""A world of processes that lives through a file of tests and runs many cases.

Joining costs time, so processes start once per world size; see ``forked.py``. A case is a module-level
function ``case(*arguments)`` that every rank runs; it returns something picklable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fault_injection.launches import free_port
from megatron_lpa.parallel.groups import ParallelGroups, Traffic
from support.forked import Forked

TESTS = str(Path(__file__).resolve().parents[1])

CASE_TIMEOUT_S = 240
AFTER_FAILURE_S = 5


@functools.cache
def _created(tp_size: int) -> ParallelGroups:
    return ParallelGroups.create(tp_size)


def groups_for(tp_size: int) -> ParallelGroups:
    """This process's groups, for use in cases; made once, as every gloo group keeps threads of its own."""
    return dataclasses.replace(_created(tp_size), traffic=Traffic())


def _send(pipe: Connection, message: Any) -> None:
    pipe.send_bytes(pickle.dumps(message))  # a connection's own pickling would share the memory of tensors


def _received(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


def serve() -> None:
    """One process: takes cases from standard input, which is a connection."""
    pipe = Connection(os.dup(0))
    sys.path[:] = _received(pipe)
    import torch

    torch.set_num_threads(1)
    from megatron_lpa.command_line import log_to_stderr
    from megatron_lpa.engine.joining import start_distributed, stop_distributed

    log_to_stderr()
    start_distributed(1)
    while message := pipe.recv_bytes():
        try:
            case, arguments = pickle.loads(message)
            _send(pipe, (True, case(*arguments)))
        except BaseException:
            _send(pipe, (False, traceback.format_exc()))
    stop_distributed()


class World:
    """``size`` processes joined over gloo."""

    def __init__(self, size: int) -> None:
        port = free_port()
        self.size = size
        self.closed = False
        self._pipes: list[Connection] = []
        self._processes: list[Forked] = []
        for rank in range(size):
            ours, theirs = socket.socketpair()
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join([TESTS, os.environ.get("PYTHONPATH",
                "")]),
            }  # fmt: skip
            words = ["-c", "from support.world import serve; serve()"]
            with theirs:
                self._processes.append(Forked(words, Path.cwd(), environment, 1, 2, theirs))
            self._pipes.append(Connection(ours.detach()))
            _send(self._pipes[-1], sys.path)

    def run(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What every rank returned, in order of rank. Fails with the tracebacks of all ranks that raised.

        After a failure the others may be waiting in a collective: they get seconds to raise as well, and the
        world ends; the fixture starts another for the next test.
        """
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it is gone, which shows below
                _send(pipe, (case, arguments))
        results: dict[int, Any] = {}
        failed: list[str] = []
        deadline = time.monotonic() + CASE_TIMEOUT_S
        while len(results) < self.size and time.monotonic() < deadline:
            waiting = [self._pipes[rank] for rank in range(self.size) if rank not in results]
            for ready in wait(waiting, timeout=max(0.0, deadline - time.monotonic())):
                rank = self._pipes.index(ready)
                try:
                    ok, results[rank] = _received(ready)
                except (EOFError, OSError):
                    ok, results[rank] = False, f"the process is gone: {self._processes[rank].poll()}"
                if not ok:
                    failed.append(f"rank {rank}:\n{results[rank]}")
                    deadline = min(deadline, time.monotonic() + AFTER_FAILURE_S)
        if failed or len(results) < self.size:
            self.close()
            silent = [rank for rank in range(self.size) if rank not in results]
            raise AssertionError("\n".join([*failed, f"ranks without an answer: {silent}"]))
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        self.closed = True
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    pipe.send_bytes(b"")
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            process.kill()
            pipe.close()
