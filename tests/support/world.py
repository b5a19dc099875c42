"""A world of processes that lives through a whole test session and runs many cases.

Importing torch and DeepSpeed costs seconds per process, so processes start once per world size. A case is
a module-level function ``case(*arguments)`` that every rank runs; it returns something picklable.
"""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as mp

CASE_TIMEOUT_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from megatron_lpa.engine.launch import start_distributed, stop_distributed

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
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What every rank returned, in order of rank. Fails with the traceback of the first rank that raised."""
        for pipe in self._pipes:
            pipe.send((case, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(CASE_TIMEOUT_S):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.size} did not answer: a collective does not match")
            ok, value = pipe.recv()
            results.append((rank, ok, value))
        failed = [f"rank {rank}:\n{value}" for rank, ok, value in results if not ok]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for _, _, value in results]

    def close(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
