"""Joining the processes that a launcher started, or running alone."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout

import torch

# DeepSpeed picks its accelerator when it is imported and warns on a machine without one. Whoever needs
# DeepSpeed takes it from here.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

from megatron_lpa.engine.compile_lock import wait_for_compilers
from megatron_lpa.errors import EXIT_REFUSED, RankError, RankHang
from megatron_lpa.ops.products import keep_partial_sums_in_fp32
from megatron_lpa.parallel.address import is_loopback, loopback_interface
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.meeting import Meeting, meet
from megatron_lpa.parallel.place import place_from_environment

TIMEOUT = datetime.timedelta(minutes=30)
AFTER_WATCHDOG = datetime.timedelta(minutes=5)


def collective_timeout(*limits_s: float) -> datetime.timedelta:
    """How long a collective waits for other ranks: longer than the watchdog, which can say who is missing and
    where.

    Args:
        limits_s: of the watchdog; where one is 0, which watches nothing, nothing ends a wait for ten years.
    """
    if not all(limits_s):
        return datetime.timedelta(days=3650)
    return max(TIMEOUT, datetime.timedelta(seconds=max(limits_s)) + AFTER_WATCHDOG)


def quiet_libraries() -> None:
    """Keep DeepSpeed's and PyTorch's own chatter out of the run's log."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed.*")


def start_distributed(
    tensor_parallel_size: int,
    timeout: datetime.timedelta = TIMEOUT,
    meeting: Meeting | None = None,
    on_wait: Callable[[bool], None] = lambda waits: None,
    enter: Callable[[str], None] = lambda stage: None,
) -> ParallelGroups:
    """Initialise ``torch.distributed`` (nccl on GPUs, gloo on CPUs) and build all groups.

    Without a launcher's environment this process becomes a world of one.

    Args:
        tensor_parallel_size: ranks that share one model.
        timeout: of every collective.
        meeting: where all processes of the launch have met; None meets them now, and compares nothing.
        on_wait: as for ``ParallelGroups``.
        enter: takes where this process is, in words that follow "rank 3 is".

    Raises:
        UserError: a rank without a GPU of its own, or a world that TP does not divide.
    """
    quiet_libraries()
    keep_partial_sums_in_fp32()
    if meeting is None:
        meeting = meet(place_from_environment(), {}, timeout.total_seconds())
    place = meeting.place
    for key, value in (
        ("RANK", place.rank),
        ("WORLD_SIZE", place.world_size),
        ("LOCAL_RANK", place.local_rank),
    ):
        os.environ.setdefault(key, str(value))
    if torch.cuda.is_available():
        if place.local_rank >= torch.cuda.device_count():
            raise RankError(
                f"local rank {place.local_rank} has no GPU: {torch.cuda.device_count()} visible; "
                "start at most one process per GPU",
                EXIT_REFUSED,
            )
        torch.cuda.set_device(place.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
    if place.local_rank == 0:
        enter("waiting for a compiler")
        wait_for_compilers()
    enter("joining the process group")
    if not torch.distributed.is_initialized():
        on_wait(True)
        _join_process_group(meeting, timeout)
        on_wait(False)
    with redirect_stdout(io.StringIO()):  # the name of an extension it builds
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return ParallelGroups.create(tensor_parallel_size, timeout, on_wait)


def _join_process_group(meeting: Meeting, timeout: datetime.timedelta) -> None:
    place = meeting.place
    # Gloo listens where the machine's name leads to, which on a cluster is its network. On one machine nobody
    # out there needs to reach it.
    alone = place.world_size == 1 or is_loopback(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if alone and (interface := loopback_interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # NCCL fetches its ids from the store with the store's own time-out.
    meeting.store.set_timeout(timeout)
    several_gpus = torch.cuda.is_available() and place.world_size > 1
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=torch.distributed.PrefixStore("torch", meeting.store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        # As DeepSpeed does it: with the device known, NCCL's communicators are made at once.
        device_id=torch.device("cuda", place.local_rank) if several_gpus else None,
    )


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
        rank = os.environ.get("RANK", "0")
        if any(words in str(error) for words in _SILENT):
            raise RankHang(
                f"rank {rank} waited for another process, which does not answer; look into the logs of the "
                "other ranks and logs/hang in the run folder, then start the same command again: it "
                "continues from the newest checkpoint"
            ) from error
        lost = isinstance(error, torch.distributed.DistNetworkError)
        if not lost and not any(words in str(error) for words in _GONE):
            raise
        raise RankError(
            f"rank {rank} lost its connection to another process, which has ended or was killed; look into "
            "the logs of the other ranks, then start the same command again: it continues from the newest "
            "checkpoint"
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
