"""A process that stays in one stage says where and leaves; one that was stopped as a whole does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lpa.train.watchdog import EXIT_HANG, FOLDER, Watchdog, odd_ones

HANGS = """
import sys, time
from pathlib import Path
from megatron_lpa.train.watchdog import Watchdog
def read_a_disk_that_does_not_answer():
    time.sleep(60)
watchdog = Watchdog(Path(sys.argv[1]), 3, 0.4)
watchdog.start()
for step in range(4):
    watchdog.enter("computing", step)
    time.sleep(0.2)
watchdog.enter("reading data", 4)
read_a_disk_that_does_not_answer()
"""


def test_a_hang_ends_the_process_with_the_stage_and_the_stacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == EXIT_HANG == 75
    assert (
        "error: rank 3 is reading data after 4 steps, for " in done.stderr and "rank_00003.txt" in done.stderr
    )
    stacks = (tmp_path / FOLDER / "rank_00003.txt").read_text()
    assert "read_a_disk_that_does_not_answer" in stacks


def test_a_disk_that_never_answers_cannot_keep_the_process(tmp_path: Path) -> None:
    """Opening a pipe that nobody reads from blocks as a dead network disk does."""
    (tmp_path / FOLDER).mkdir(parents=True)
    os.mkfifo(tmp_path / FOLDER / "rank_00003.txt")
    code = HANGS.replace(
        "watchdog = ",
        "from megatron_lpa.train import watchdog as module; module.LAST_WORDS_S = 1.0; watchdog = ",
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30)  # fmt: skip
    assert done.returncode == EXIT_HANG
    assert "error: rank 3 is reading data after 4 steps, for " in done.stderr


def test_native_code_that_keeps_python_s_lock_cannot_keep_the_process(tmp_path: Path) -> None:
    """The watchdog's threads cannot run either."""
    code = HANGS.replace("time.sleep(60)", "import ctypes; ctypes.PyDLL(None).usleep(30_000_000)").replace(
        "watchdog = ",
        "from megatron_lpa.train import watchdog as module; module.BACKSTOP_S = 0.3; watchdog = ",
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=25)  # fmt: skip
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "read_a_disk_that_does_not_answer" in done.stderr


STOPPED = """
import sys, time
from pathlib import Path
from megatron_lpa.train.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]), 0, 1.0)
watchdog.start()
watchdog.enter("computing", 1)
print("ready", flush=True)
time.sleep(0.5)
watchdog.stop()
print("done", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGSTOP")
def test_time_in_which_the_whole_process_stood_still_does_not_count(tmp_path: Path) -> None:
    import signal

    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == "done\n"
    assert process.returncode == 0 and not (tmp_path / FOLDER).exists()


def report(folder: Path, rank: int, stage: str, step: int, age_s: float = 0.0) -> None:
    folder.mkdir(exist_ok=True)
    content = {"rank": rank, "stage": stage, "step": step, "time": time.time() - age_s}
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(content))


def test_the_rank_that_is_elsewhere_is_named(tmp_path: Path) -> None:
    for rank in (0, 1, 3):
        report(tmp_path, rank, "waiting for other ranks", 7)
    assert odd_ones(tmp_path) == []
    report(tmp_path, 2, "reading data", 7)
    report(tmp_path, 9, "in Checkpoints", 2, age_s=10_000)  # of an earlier hang
    report(tmp_path, 10, "in Checkpoints", 2, age_s=-10_000)  # of before the clock was set back
    (tmp_path / "rank_00011.json").write_text("torn")
    (tmp_path / "rank_00012.json").write_text("[1]")
    assert odd_ones(tmp_path) == [
        "rank 2 is reading data after 7 steps, where most ranks are waiting for other ranks after 7 steps: "
        "look at it first"
    ]


def test_ranks_that_are_not_heard_of_are_named(tmp_path: Path) -> None:
    assert odd_ones(tmp_path, 4) == []  # when no file arrives, the disk is what is wrong
    for rank in (0, 3):
        report(tmp_path, rank, "waiting for other ranks", 7)
    (line,) = odd_ones(tmp_path, 4)
    assert line.startswith(
        "nothing is heard of 2 of 4 ranks (1, 2): each stands still as a whole, is gone, or"
    )
    assert "(1, 2, 4, " in odd_ones(tmp_path, 64)[0] and "20, 21, ...)" in odd_ones(tmp_path, 64)[0]


def test_without_a_limit_nothing_is_watched(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 0.0)
    watchdog.start()
    assert not watchdog._thread.is_alive() and not list(tmp_path.iterdir())
