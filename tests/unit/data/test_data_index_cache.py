"""Sample indices on disk: made once, whole or not at all, whoever makes them."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from support.hiccups import first_looks_fail

from megatron_lpa.data import index_cache
from megatron_lpa.data.index_cache import IndexCache, SampleIndex, default_folders
from megatron_lpa.errors import UserError

STARTS = np.arange(2000, dtype=np.uint32).reshape(1000, 2)


class Maker:
    """Makes the index of ``STARTS`` and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> SampleIndex:
        self.calls += 1
        return SampleIndex(STARTS, 12345)


def cache(*folders: Path, timeout_s: float = 5.0, said: list[str] | None = None) -> IndexCache:
    return IndexCache(folders, timeout_s, (said if said is not None else []).append)


def check(index: SampleIndex) -> None:
    assert np.array_equal(index.starts, STARTS) and index.num_tokens == 12345


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_made_once_then_mapped(tmp_path: Path) -> None:
    make = Maker()
    for _ in range(3):
        found = cache(tmp_path).get("train", "key", make)
        check(found)
        assert not found.starts.flags.writeable and isinstance(found.starts.base, np.memmap)
    assert make.calls == 1
    assert only_file(tmp_path).name.startswith("train-")  # neither a lock nor anything unfinished stays


def test_another_key_is_another_file(tmp_path: Path) -> None:
    make = Maker()
    cache(tmp_path).get("train", "key", make)
    cache(tmp_path).get("train", "other", make)
    assert make.calls == 2 and len(list(tmp_path.iterdir())) == 2


def test_an_index_without_samples(tmp_path: Path) -> None:
    for _ in range(2):
        found = cache(tmp_path).get("test", "key", lambda: SampleIndex(np.empty((0, 2), np.uint32), 7))
        assert found.starts.shape == (0, 2) and found.num_tokens == 7


def damage_last_byte(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        damage_last_byte,
        lambda data: data[:70] + b"\xff" + data[71:],
        lambda data: b"NOTOURS!" + data[8:],
        lambda data: data[:8] + b"\x63" + data[9:],  # of another format
        lambda data: data[:20] + bytes(32) + data[52:],  # of another key
        lambda data: data[:48] + b"\x01" + data[49:],  # another number of tokens
    ],
)
def test_a_damaged_or_foreign_file_is_made_again(tmp_path: Path, damage) -> None:
    make, said = Maker(), []
    cache(tmp_path).get("train", "key", make)
    path = only_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    check(cache(tmp_path, said=said).get("train", "key", make))
    assert make.calls == 2
    assert [str(path) in line and "made again" in line for line in said] == [True]
    check(cache(tmp_path).get("train", "key", make))
    assert make.calls == 2


def test_the_first_folder_that_can_be_written_is_used_and_all_are_read(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    make = Maker()
    check(cache(blocked / "x", tmp_path / "b").get("train", "key", make))
    check(cache(tmp_path / "a", tmp_path / "b").get("train", "key", make))
    assert make.calls == 1 and not (tmp_path / "a").exists()
    with pytest.raises(UserError, match=r"no folder for the sample index: .*file/x .*data\.cache_dir"):
        cache(blocked / "x", blocked / "y").get("train", "key", make)


def test_a_folder_without_write_permission_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    real = os.access  # root may write anywhere, so the answer is made up
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and real(path, mode))
    check(cache(locked, tmp_path / "b").get("train", "key", Maker()))
    assert list(locked.iterdir()) == [] and only_file(tmp_path / "b")


def test_default_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_folders("data/a.b") == [Path("data/a.b.cache"), Path("/elsewhere/megatron_lpa")]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folders("a")[1] == Path("/home/me/.cache/megatron_lpa")


def test_without_a_home_there_is_one_folder_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")  # as pathlib does for an unknown user

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", staticmethod(home))
    assert default_folders("data/a") == [Path("data/a.cache")]


def slowly(folder: str, log: str) -> int:
    def make() -> SampleIndex:
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return SampleIndex(STARTS, 12345)

    found = cache(Path(folder), timeout_s=30).get("train", "key", make)
    return int(found.starts.sum()) + found.num_tokens


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    # Not forked: the process that runs tests has threads, and a lock that one holds stays locked in a child.
    with get_context("spawn").Pool(4) as pool:
        sums = pool.starmap(slowly, [(str(folder), str(log))] * 4)
    assert sums == [int(STARTS.sum()) + 12345] * 4
    assert log.read_text() == "made\n"
    assert only_file(folder).suffix == ".index"


def no_locks(descriptor: int, operation: int) -> None:
    raise OSError(38, "Function not implemented")


def take_locks_away() -> None:
    fcntl.flock = no_locks


def test_without_locks_all_make_it_and_it_is_whole(tmp_path: Path) -> None:
    with get_context("spawn").Pool(3, take_locks_away) as pool:
        sums = pool.starmap(slowly, [(str(tmp_path / "cache"), str(tmp_path / "log"))] * 3)
    assert sums == [int(STARTS.sum()) + 12345] * 3
    assert only_file(tmp_path / "cache").suffix == ".index"


KILLED = """
import os, sys, time
import numpy as np
from pathlib import Path
from megatron_lpa.data import index_cache
def slow(source, target):
    os.truncate(source, 5000)
    print("writing", flush=True)
    time.sleep(600)
os.replace = slow
starts = np.arange(2000, dtype=np.uint32).reshape(1000, 2)
cache = index_cache.IndexCache([Path(sys.argv[1])], 5.0, print)
cache.get("train", "key", lambda: index_cache.SampleIndex(starts, 12345))
"""


def test_a_killed_maker_leaves_nothing_whole_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    with pytest.raises(UserError, match="another process"):  # it lives: others wait
        cache(tmp_path, timeout_s=0.2).get("train", "key", Maker())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list(tmp_path.glob("*.index")) and list(tmp_path.glob("*.partial"))
    make = Maker()
    with monkeypatch.context() as patched:
        failed = first_looks_fail(patched, tmp_path, errno.ESTALE)
        check(cache(tmp_path, timeout_s=0.2).get("train", "key", make))
    assert failed == {str(tmp_path)}
    assert make.calls == 1 and only_file(tmp_path).suffix == ".index"


def test_waiting_has_a_limit_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path).get("train", "key", Maker())
    path = only_file(tmp_path)
    path.unlink()
    monkeypatch.setattr(index_cache, "_QUIET_WAIT_S", 0.1)
    said: list[str] = []
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        with pytest.raises(UserError) as error:
            cache(tmp_path, timeout_s=0.4, said=said).get("train", "key", Maker())
        assert 0.4 <= time.monotonic() - started < 3
    for part in (str(path), "0.4 s", "data.index_timeout_s", "data.cache_dir"):
        assert part in str(error.value)
    assert len(said) == 1 and str(path) in said[0] and "waiting" in said[0]


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    big = SampleIndex(np.zeros((1 << 16, 2), dtype=np.uint32), 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(UserError, match="no room to write"):
            cache(tmp_path).get("train", "key", lambda: big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_returns_other_bytes_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def damaging(source: Path, target: Path) -> None:
        Path(source).write_bytes(damage_last_byte(Path(source).read_bytes()))
        real(source, target)

    monkeypatch.setattr(os, "replace", damaging)
    with pytest.raises(UserError, match=r"reads back other than it was written"):
        cache(tmp_path).get("train", "key", Maker())
