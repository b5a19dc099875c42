"""What the engine does when a neighbour or the disk is gone in the middle of something."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch

from megatron_lpa.checkpoint.tensor_file import write_tensors
from megatron_lpa.config import TrainConfig
from megatron_lpa.engine.joining import collective_timeout, explained_losses
from megatron_lpa.errors import EXIT_HANG, RankError, RankHang


@pytest.mark.parametrize(
    "words",
    [
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:22435. GLHF!",
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:4: Connection reset by peer",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_lost_neighbour_is_one_line_with_what_to_do(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(RankError) as told, explained_losses():
        raise RuntimeError(words)
    assert str(told.value).startswith("rank 3 lost its connection to another process, which has ended")
    assert "\n" not in str(told.value) and "GLHF" not in str(told.value)


@pytest.mark.parametrize(
    "words",
    [
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to "
        "complete",
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)",
    ],
)
def test_a_neighbour_that_does_not_answer_is_a_hang(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(RankHang) as told, explained_losses():
        raise RuntimeError(words)
    assert str(told.value).startswith("rank 3 waited for another process, which does not answer")
    assert told.value.exit_code == EXIT_HANG and "\n" not in str(told.value)


@pytest.mark.parametrize("limit_s", [TrainConfig.step_timeout_s, 0.0, 4.0, 7200.0])
def test_the_watchdog_comes_before_the_time_out_of_collectives(limit_s: float) -> None:
    """It can say which rank is where; gloo and NCCL cannot."""
    seconds = collective_timeout(limit_s).total_seconds()
    assert seconds >= limit_s + 300 and seconds >= 1800


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained_losses():
        raise RuntimeError("shapes do not fit")


def test_what_could_not_be_written_whole_is_removed_at_once(tmp_path: Path) -> None:
    """Else the records of a run that goes on would find the disk as full as the checkpoint left it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(tmp_path, "x.safetensors", [("a", torch.zeros(1 << 16))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.iterdir()) == []
