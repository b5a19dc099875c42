"""Joining the processes that a launcher started, or running alone."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout

import torch

# DeepSpeed picks its accelerator when it is imported and warns on a machine without one.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

from megatron_lpa.engine.compile_lock import wait_for_compilers
from megatron_lpa.errors import RankError, RankHang, UserError
from megatron_lpa.ops.linear import keep_partial_sums_in_fp32
from megatron_lpa.parallel.groups import ParallelGroups

TIMEOUT = datetime.timedelta(minutes=30)
AFTER_WATCHDOG = datetime.timedelta(minutes=5)


def collective_timeout(step_timeout_s: float) -> datetime.timedelta:
    """How long a collective waits for other ranks: longer than the watchdog, which can say who is missing and where.

    Args:
        step_timeout_s: ``train.step_timeout_s``; 0 watches nothing.
    """
    return max(TIMEOUT, datetime.timedelta(seconds=step_timeout_s) + AFTER_WATCHDOG)


def world_from_environment() -> tuple[int, int, int]:
    """``(rank, world_size, local_rank)`` as set by ``deepspeed``, ``torchrun`` or srun's wrapper."""
    try:
        values = [
            int(os.environ.get(key, default))
            for key, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        ]
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
    return values[0], values[1], values[2]


def _local_world_size(world_size: int) -> int:
    """Processes on this machine: torchrun's variable, then DeepSpeed's, then all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet_libraries() -> None:
    """Keep DeepSpeed's and PyTorch's own chatter out of the run's log."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed.*")


def start_distributed(tensor_parallel_size: int, timeout: datetime.timedelta = TIMEOUT) -> ParallelGroups:
    """Initialise ``torch.distributed`` (nccl on GPUs, gloo on CPUs) and build all groups.

    Without a launcher's environment this process becomes a world of one.

    Args:
        tensor_parallel_size: ranks that share one model.
        timeout: of every collective.

    Raises:
        UserError: a rank without a GPU of its own, or a world that TP does not divide.
    """
    quiet_libraries()
    keep_partial_sums_in_fp32()
    rank, world_size, local_rank = world_from_environment()
    if "MASTER_PORT" not in os.environ:
        if world_size > 1:
            raise UserError("WORLD_SIZE is above 1 but MASTER_PORT is not set; start through a launcher")
        os.environ["MASTER_PORT"] = str(_free_port())
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    for key, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", local_rank)):
        os.environ.setdefault(key, str(value))
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RankError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; "
                "start at most one process per GPU"
            )
        torch.cuda.set_device(local_rank)
        backend = "nccl"
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _local_world_size(world_size)))
    if local_rank == 0:
        wait_for_compilers()
    with redirect_stdout(io.StringIO()):  # the name of an extension it builds
        try:
            deepspeed.init_distributed(
                dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False
            )
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
            raise RankError(
                f"the processes cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}; "
                "if another run uses this port, give the launcher another --master_port"
            ) from error
    return ParallelGroups.create(tensor_parallel_size, timeout)


_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process exited")
"""What gloo and NCCL say when the process at the other end has ended."""

_SILENT = ("Timed out waiting", "collective operation timeout")
"""What they say when it does not answer."""


@contextlib.contextmanager
def explained_losses() -> Iterator[None]:
    """Tell in one line that another process is gone; where it happened here says nothing about why.

    Raises:
        RankError: on each rank that notices; a RankHang where the other one is silent, but not gone.
    """
    try:
        yield
    except RuntimeError as error:
        rank, _, _ = world_from_environment()
        if any(words in str(error) for words in _SILENT):
            raise RankHang(
                f"rank {rank} waited for another process, which does not answer; look into the logs of the other ranks and "
                "logs/hang in the run folder, then start the same command again: it continues from the newest checkpoint"
            ) from error
        lost = isinstance(error, torch.distributed.DistNetworkError)
        if not lost and not any(words in str(error) for words in _GONE):
            raise
        raise RankError(
            f"rank {rank} lost its connection to another process, which has ended or was killed; look into the logs "
            "of the other ranks, then start the same command again: it continues from the newest checkpoint"
        ) from error


def device_of_rank() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def stop_distributed() -> None:
    """Leave the world in order."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
