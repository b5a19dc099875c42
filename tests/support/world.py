"""A world of processes that lives through a whole test session and runs many cases.

Importing torch and DeepSpeed costs seconds per process, so processes start once per world size. A case is
a module-level function ``case(*arguments)`` that every rank runs; it returns something picklable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.multiprocessing as mp

from megatron_lpa.parallel.groups import ParallelGroups, Traffic

CASE_TIMEOUT_S = 240
AFTER_FAILURE_S = 5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def _created(tp_size: int) -> ParallelGroups:
    return ParallelGroups.create(tp_size)


def groups_for(tp_size: int) -> ParallelGroups:
    """This process's groups, for use in cases; made once, as every gloo group keeps threads of its own."""
    return dataclasses.replace(_created(tp_size), traffic=Traffic())


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from megatron_lpa.command_line import log_to_stderr
    from megatron_lpa.engine.joining import start_distributed, stop_distributed

    log_to_stderr()
    start_distributed(1)
    while (message := pipe.recv()) is not None:
        case, arguments = message
        try:
            pipe.send((True, case(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    stop_distributed()


class World:
    """``size`` processes joined over gloo."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        self.size = size
        self.closed = False
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What every rank returned, in order of rank. Fails with the tracebacks of all ranks that raised.

        After a failure the others may be waiting in a collective: they get seconds to raise as well, and the
        world ends; the fixture starts another for the next test.
        """
        for pipe in self._pipes:
            pipe.send((case, arguments))
        results: dict[int, Any] = {}
        failed: list[str] = []
        deadline = time.monotonic() + CASE_TIMEOUT_S
        while len(results) < self.size and time.monotonic() < deadline:
            waiting = [self._pipes[rank] for rank in range(self.size) if rank not in results]
            for ready in wait(waiting, timeout=max(0.0, deadline - time.monotonic())):
                rank = self._pipes.index(ready)
                ok, results[rank] = ready.recv()
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
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(None)
        for process in self._processes:
            process.join(3)
            if process.is_alive():
                process.kill()
