"""Processes that were not started alike are refused before anything is made; whatever hangs at the start is
named."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import SMALL, Launch, launch

from fault_injection.launches import free_port

DATA = ["--data.prefix", "data", "--data.split", "1,0,0", "--train.steps", "2"]

DIFFERENT = {
    "learning rate": (["--optim.lr", "0.5"], "optim.lr is 0.5 on rank 1"),
    "seed of the documents": (["--data.document_seed", "9"], "data.document_seed is 9 on rank 1"),
    "dropout": (["--model.dropout", "0.1"], "model.dropout is 0.1 on rank 1"),
    "ZeRO stage": (["--train.deepspeed_config", "zero2"], "zero_optimization.stage"),
    "tensor parallel size": (
        ["--parallel.tensor_parallel_size", "2", "--model.pad_vocab_to_multiple_of", "2"],
        "parallel.tensor_parallel_size is 2 on rank 1",
    ),
    "precision": (["--train.precision", "bf16"], 'train.precision is "bf16" on rank 1'),
    "micro-batch": (["--train.micro_batch_size", "1"], "train.micro_batch_size is 1 on rank 1"),
    "layers": (["--model.num_layers", "3"], "model.num_layers is 3 on rank 1"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_one_option_that_differs_on_one_rank_is_refused_by_all(folder: Path, case: str) -> None:
    more, words = DIFFERENT[case]
    finished = launch([*SMALL, *DATA, "--logging.name", "unlike"], 2, folder, more={1: more})
    assert finished.codes == [78, 78], finished.stderr
    assert len(finished.errors) == 1 and words in finished.errors[0], finished.stderr
    assert socket.gethostname() in finished.errors[0]
    assert not (folder / "runs" / "unlike").exists()


def test_other_files_at_the_same_path_are_noticed(folder: Path, tmp_path: Path) -> None:
    """As where each machine has a copy of the data of its own, and one is out of date."""
    for rank in (0, 1):
        here = tmp_path / str(rank)
        here.mkdir()
        for suffix in (".bin", ".idx"):
            shutil.copy(folder / f"data{suffix}", here / f"data{suffix}")
    tokens = bytearray((tmp_path / "1" / "data.bin").read_bytes())
    tokens[100:102] = b"\x05\x00" if tokens[100:102] != b"\x05\x00" else b"\x06\x00"
    (tmp_path / "1" / "data.bin").write_bytes(tokens)
    entry = (
        "import os, sys; os.chdir(sys.argv[1]); from megatron_lpa.pretrain import *; "
        "leave(main(sys.argv[2:]))"
    )
    port, processes = free_port(), []
    for rank in (0, 1):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [sys.executable, "-c", entry, str(tmp_path / str(rank)), *SMALL, *DATA]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [78, 78], said
    assert "training data.contents is" in said[0] and "on rank 1" in said[0] and "error:" not in said[1]
    assert not (tmp_path / "0" / "runs").exists()


def test_a_rank_that_hangs_while_it_opens_data_is_named_and_no_other(folder: Path) -> None:
    finished = launch(
        [*SMALL, *DATA, "--logging.name", "hangs", "--train.start_timeout_s", "12"], 2, folder,
        faults={"start": "hang"},  # type: ignore[dict-item]
    )  # fmt: skip
    assert finished.codes == [75, 75], finished.stderr
    for text in finished.stderr:
        assert "error: rank 1 is opening data, and 1 waits for it: look at it first" in text
        assert text.count("look at it first") == 1
        assert "train.start_timeout_s" in text
    assert "open_data" in finished.stderr[1], (
        "the stacks say what it does; there is no run folder yet to keep them"
    )
    assert not (folder / "runs" / "hangs").exists()


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_rank_whose_checkpoint_hangs_is_named_and_no_other(folder: Path, overlap: str) -> None:
    """Also where a thread writes it."""
    finished = launch(
        [*SMALL, *DATA, "--train.steps", "6", "--logging.name", f"writes-{overlap}",
        "--train.checkpoint_interval", "2",
         "--train.checkpoint_overlap", overlap, "--train.step_timeout_s", "8"], 2, folder,
        faults={"write": "hang"},  # type: ignore[dict-item]
    )  # fmt: skip
    assert finished.codes == [75, 75], finished.stderr
    for text in finished.stderr:
        assert "error: rank 1 is writing a checkpoint after" in text and text.count("look at it first") == 1
    stacks = (folder / "runs" / f"writes-{overlap}" / "logs" / "hang" / "rank_00001.txt").read_text()
    assert "write_tensors" in stacks


def test_a_rank_that_is_killed_while_it_opens_data_ends_the_others(folder: Path) -> None:
    finished = launch([*SMALL, *DATA, "--logging.name", "dies"], 2, folder, faults={"start": "die"})  # type: ignore[dict-item]
    assert finished.codes[1] == 9 and finished.codes[0] == 1, finished.stderr
    assert "rank 0 lost its connection to another process" in finished.errors[0]


def test_a_rank_that_never_starts_is_named(folder: Path) -> None:
    launched = Launch([*SMALL, *DATA, "--logging.name", "one", "--train.start_timeout_s", "12"], 2, folder)
    launched.processes[1].send_signal(signal.SIGKILL)
    finished = launched.wait()
    assert finished.codes[0] == 75 and "1 of 2 processes have not come" in finished.errors[0], finished.stderr
    assert "rank 1" in finished.errors[0] and not (folder / "runs" / "one").exists()


def test_what_one_rank_alone_finds_wrong_is_told_by_it(folder: Path) -> None:
    finished = launch(
        [*SMALL, *DATA, "--logging.name", "wrong", "--train.start_timeout_s", "8"], 2, folder,
        more={1: ["--train.seed", "many"]},
    )  # fmt: skip
    assert finished.codes[1] == 78
    (told,) = [line for line in finished.stderr[1].splitlines() if line.startswith("error:")]
    assert "rank 1 (" in told and "train.seed is 'many'" in told
    assert "exit code 78" in finished.stderr[1], "so that nothing starts it again"
