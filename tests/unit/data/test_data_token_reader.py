"""A disk that does not give tokens is an error with the file and the offset, and not the end of the
process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lpa import files
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter
from megatron_lpa.errors import TryAgain

TOKENS = 40_000


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.arange(TOKENS).astype(np.uint16))
    return IndexedDataset(tmp_path / "data")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    return waited


def test_tokens_are_those_of_the_file(dataset: IndexedDataset) -> None:
    for start, stop in ((0, 5), (1234, 20_000), (TOKENS - 1, TOKENS), (7, 7)):
        assert dataset.tokens(start, stop).tolist() == list(range(start, stop))
        assert dataset.tokens(start, stop).dtype == np.uint16
    assert not dataset.tokens(0, 5).flags.writeable


def test_a_file_that_became_shorter_is_an_error_and_does_not_end_the_process(tmp_path: Path) -> None:
    """In a process of its own: read through a mapping, this is SIGBUS."""
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.zeros(TOKENS, np.uint16))
    code = """
import os, sys
from megatron_lpa import files
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.errors import TryAgain
files.PAUSES_S = (0.01, 0.01)
dataset = IndexedDataset(sys.argv[1])
os.truncate(sys.argv[1] + ".bin", 10_000)
try:
    dataset.tokens(4_000, 30_000)
except TryAgain as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done
    assert (
        f"{tmp_path}/data.bin: cannot be read (the file ends at byte 10000, reading 52000 bytes at offset "
        "8000)" in done.stdout
    )


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOMEM, errno.EINTR]
)
def test_what_a_network_disk_does_not_give_at_first_is_asked_for_again(
    dataset: IndexedDataset, pauses: list[float], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, failures = os.pread, [number] * len(files.PAUSES_S)

    def pread(*arguments: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "no answer")
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    assert dataset.tokens(3, 6).tolist() == [3, 4, 5]
    assert pauses == list(files.PAUSES_S)
    failures += [number] * 4
    with pytest.raises(TryAgain, match=r"data\.bin: .*no answer, reading 6 bytes at offset 6.*4 attempts"):
        dataset.tokens(3, 6)


def test_what_does_not_pass_is_not_waited_for(
    dataset: IndexedDataset, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pread(*arguments: int) -> bytes:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(PermissionError, match="no, reading"):
        dataset.tokens(0, 1)
    assert pauses == []


def test_a_stale_handle_is_opened_again_but_never_another_file(
    dataset: IndexedDataset, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, stale = Path(f"{dataset.prefix}.bin"), os.pread, set()

    def pread(descriptor: int, *arguments: int) -> bytes:
        if os.fstat(descriptor).st_ino in stale:
            raise OSError(errno.ESTALE, "stale")
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, "pread", pread)
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    stale.add(path.stat().st_ino)
    copy.rename(path)
    assert dataset.tokens(10, 12).tolist() == [10, 11] and pauses == [files.PAUSES_S[0]]
    stale.add(path.stat().st_ino)
    copy.write_bytes(b"\0" * 10)
    copy.rename(path)
    with pytest.raises(TryAgain, match="stale"):
        dataset.tokens(10, 12)


def test_parts_that_the_system_gives_are_put_together(
    dataset: IndexedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 7), offset))
    assert dataset.tokens(100, 130).tolist() == list(range(100, 130))
