"""A process that stays in one stage says where and leaves; one that was stopped as a whole does not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from fault_injection.launches import free_port
from megatron_lpa.train.watchdog import EXIT_HANG, FOLDER, Watchdog, Whereabouts, suspects

HANGS = """
import sys, time
from pathlib import Path
from megatron_lpa.train.watchdog import Watchdog
def read_a_disk_that_does_not_answer():
    time.sleep(60)
watchdog = Watchdog(3)
watchdog.write_stacks_to(Path(sys.argv[1]))
watchdog.start(0.4, "train.step_timeout_s")
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
    """Bringing the stacks to such a disk blocks for ever."""
    code = HANGS.replace(
        "watchdog = ",
        "import os; os.fsync = lambda descriptor: time.sleep(1000)\n"
        "from megatron_lpa.train import watchdog as module; module.LAST_WORDS_S = 1.0; watchdog = ",
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30)  # fmt: skip  # noqa: E501
    assert done.returncode == EXIT_HANG
    assert "error: rank 3 is reading data after 4 steps, for " in done.stderr


def test_native_code_that_keeps_python_s_lock_cannot_keep_the_process(tmp_path: Path) -> None:
    """The watchdog's threads cannot run either."""
    code = HANGS.replace("time.sleep(60)", "import ctypes; ctypes.PyDLL(None).usleep(30_000_000)").replace(
        "watchdog = ",
        "from megatron_lpa.train import watchdog as module; module.BACKSTOP_S = 0.3; watchdog = ",
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=25)  # fmt: skip  # noqa: E501
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "read_a_disk_that_does_not_answer" in done.stderr


STOPPED = """
import sys, time
from pathlib import Path
from megatron_lpa.train.watchdog import Watchdog
watchdog = Watchdog(0)
watchdog.write_stacks_to(Path(sys.argv[1]))
watchdog.start(1.0)
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


RANK_OF_TWO = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from megatron_lpa.train.watchdog import Watchdog
rank, port, stuck = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
store.add("there", 1)
while store.add("there", 0) < 2:
    time.sleep(0.05)
watchdog = Watchdog(rank)
watchdog.write_stacks_to(Path(sys.argv[1]))
watchdog.join_board(store, 2)
watchdog.start(2.0, "train.step_timeout_s")
watchdog.enter("reading data", 3)
store.add("watched", 1)
if stuck == "rank 0 stands still" and rank == 0:
    while store.add("watched", 0) < 2:
        time.sleep(0.05)
    import os, signal
    os.kill(os.getpid(), signal.SIGSTOP)
if stuck == f"rank {1 - rank} reads":
    watchdog.wait(True)
time.sleep(60)
"""


def two_ranks(folder: Path, stuck: str) -> list[subprocess.Popen]:
    port = str(free_port())
    command = [sys.executable, "-c", RANK_OF_TWO, str(folder)]
    return [
        subprocess.Popen([*command, str(rank), port, stuck], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("reading", [0, 1])
def test_of_two_ranks_the_one_that_waits_is_never_the_suspect(tmp_path: Path, reading: int) -> None:
    processes = two_ranks(tmp_path, f"rank {reading} reads")
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75]
    for text in said:
        assert f"rank {reading} is reading data after 3 steps, and 1 waits for it: look at it first" in text
        assert f"rank {1 - reading} is waiting for other ranks (reading data) after 3 steps:" not in text
        assert text.count("look at it first") == 1


def test_a_rank_0_that_stands_still_as_a_whole_is_named(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, "rank 0 stands still")
    said = second.communicate(timeout=60)[1]
    first.kill()
    first.communicate()
    assert second.returncode == 75
    assert (
        "rank 0, which knows where the others are, does not answer: look at it first" in said
        and "error: rank 1 is reading data" in said
    )


class Store:
    """A store that others' answers come from; while ``broken``, it fails."""

    def __init__(self, **reports: Whereabouts) -> None:
        self.broken, self.told = False, {key: json.dumps(asdict(where)) for key, where in reports.items()}

    def set(self, key: str, value: str) -> None:
        if self.broken:
            raise RuntimeError("Connection reset by peer")
        self.told[key] = value

    def check(self, keys: list[str]) -> bool:
        if self.broken:
            raise RuntimeError("Connection reset by peer")
        return all(key in self.told for key in keys)

    def get(self, key: str) -> str:
        if self.broken:
            raise RuntimeError("Connection reset by peer")
        return self.told[key]


def test_a_store_that_failed_once_is_asked_again() -> None:
    store = Store()
    watchdog = Watchdog(1)
    watchdog.join_board(store, 2)
    watchdog.enter("computing", 4)
    store.broken = True
    watchdog._post(True)
    assert watchdog._suspects() == [
        "rank 0, which knows where the others are, does not answer: look at it first, and whether this "
        "machine reaches it"
    ]
    store.broken = False
    store.told["whereabouts/0"] = json.dumps(asdict(Whereabouts("reading data", 4)))
    watchdog._post(True)
    assert json.loads(store.told["whereabouts/1"])["stage"] == "computing"
    watchdog.wait(True)
    assert watchdog._suspects() == [
        "rank 0 is reading data after 4 steps, and 1 waits for it: look at it first"
    ]
    watchdog._post(False)
    assert json.loads(store.told["whereabouts/1"]) is None


def test_before_all_have_met_a_rank_0_that_is_silent_is_named() -> None:
    watchdog = Watchdog(1)
    watchdog.join_board(None, 2)
    assert "rank 0" in watchdog._suspects()[0]


def at(stage: str, step: int = 7, waits: bool = False) -> Whereabouts:
    return Whereabouts(stage, step, waits)


def test_the_rank_that_others_wait_for_is_named() -> None:
    reports = {rank: at("reading data", 7, waits=True) for rank in (0, 1, 3)}
    assert suspects(reports, 3 + 1) == [
        "nothing is heard of 1 of 4 ranks (2): each stands still as a whole, is gone, or has not been in "
        "one place for long: look there first"
    ]
    reports[2] = at("reading data")
    assert suspects(reports, 4) == [
        "rank 2 is reading data after 7 steps, and 3 wait for it: look at it first"
    ]


def test_where_nobody_waits_the_rank_that_is_elsewhere_than_most_is_named() -> None:
    reports = {rank: at("computing") for rank in range(3)}
    assert suspects(reports, 3) == []
    reports[1] = at("in Checkpoints")
    assert suspects(reports, 3) == [
        "rank 1 is in Checkpoints after 7 steps, where most ranks are computing after 7 steps: look at it "
        "first"
    ]
    del reports[2]
    assert suspects(reports, 2) == [
        "the ranks are at different places: rank 0 is computing after 7 steps, rank 1 is in Checkpoints "
        "after 7 steps"
    ], "of two that both work, neither is accused"


def test_when_all_wait_none_is_accused() -> None:
    (line,) = suspects({rank: at("in Checkpoints", waits=True) for rank in range(4)}, 4)
    assert "all ranks wait for each other" in line and "first" not in line


def test_of_many_ranks_twenty_are_named() -> None:
    (line,) = suspects({0: at("computing"), 3: at("computing")}, 64)
    assert line.startswith("nothing is heard of 62 of 64 ranks (1, 2, 4, ") and "20, 21, ...)" in line


def test_before_the_first_step_no_step_is_named() -> None:
    assert str(Whereabouts("opening data")) == "opening data"


def test_without_a_limit_nothing_ends_the_process(tmp_path: Path) -> None:
    left: list[int] = []
    watchdog = Watchdog(0, left.append)
    watchdog.write_stacks_to(tmp_path)
    watchdog.start(0.0)
    time.sleep(0.3)
    watchdog.stop()
    assert not left and not list(tmp_path.iterdir())


def test_a_new_limit_counts_from_now_on(tmp_path: Path) -> None:
    """The start may take longer than a step may."""
    left: list[int] = []
    watchdog = Watchdog(0, left.append)
    watchdog.start(60.0)
    time.sleep(0.5)
    watchdog.limit(0.4, "train.step_timeout_s")
    deadline_s = time.monotonic() + 20
    while not left and time.monotonic() < deadline_s:
        time.sleep(0.05)
    watchdog.stop()
    assert left and set(left) == {75}
