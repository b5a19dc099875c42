"""Reading what a disk gives at the second attempt, or never; writing that follows no link."""

from __future__ import annotations

import errno
import os
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa import files
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import (
    UnusableFile,
    exists,
    fsync_folder,
    is_dir,
    is_file,
    is_link,
    new_file,
    read_bytes,
    read_json,
    read_text,
    refuse_link,
    sha256,
    write_whole,
)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the next so many openings of files fail, and takes no pauses."""
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    real = os.open

    def fail(number: int, times: int) -> list[int]:
        left = [times]

        def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return real(path, flags, *more, **options)

        monkeypatch.setattr(os, "open", opened)
        return left

    return fail


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT])
def test_what_may_pass_is_tried_again(tmp_path: Path, failing: Any, number: int) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2]}')
    left = failing(number, 3)
    assert read_json(tmp_path / "a.json") == {"a": [1, 2]}
    assert left == [0]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_what_does_not_pass_asks_for_another_start(tmp_path: Path, failing: Any, number: int) -> None:
    (tmp_path / "a").write_text("x")
    failing(number, 9)
    with pytest.raises(TryAgain, match=r"a: cannot be read .* at 4 attempts") as caught:
        read_bytes(tmp_path / "a")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ELOOP])
def test_names_and_permissions_are_no_hiccup(tmp_path: Path, failing: Any, number: int) -> None:
    left = failing(number, 9)
    with pytest.raises(OSError) as caught:
        read_bytes(tmp_path / "a")
    assert caught.value.errno == number and left == [8]


def test_a_read_that_fails_inside_is_tried_again_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 100)
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))
    real, calls = files.open_regular, []

    class Torn:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def fileno(self) -> int:
            return self._file.fileno()

        def read(self, count: int) -> bytes:
            if self._file.tell():
                raise OSError(errno.EIO, "Input/output error")
            return self._file.read(min(count, 1000))

    def opened(path: Any) -> Any:
        calls.append(path)
        return Torn(real(path)) if len(calls) == 1 else real(path)

    monkeypatch.setattr(files, "open_regular", opened)
    assert read_bytes(tmp_path / "a") == bytes(range(256)) * 100
    assert len(calls) == 2


def test_a_pipe_is_not_waited_for_and_a_device_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    for path, what in (
        (tmp_path / "socket", "a socket"),
        (tmp_path / "pipe", "a named pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a folder"),
    ):
        for read in (read_bytes, read_text, read_json, sha256):
            with pytest.raises(UnusableFile, match=f"{path}: {what}, not a regular file"):
                read(path)


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to("a")
    assert read_text(tmp_path / "link") == "x"


def test_nothing_longer_than_its_kind_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "long", "wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no room, reading it would
    with pytest.raises(UnusableFile, match="1,099,511,627,776 bytes, more than the 67,108,864"):
        read_bytes(tmp_path / "long")
    (tmp_path / "ten").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "ten", 10) == b"0123456789"
    with pytest.raises(UnusableFile):
        read_bytes(tmp_path / "ten", 9)
    with pytest.raises(UnusableFile):  # a file whose length the system does not know beforehand
        read_bytes("/proc/self/status", 10)
    assert b"Name:" in read_bytes("/proc/self/status")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1', "line 1: not valid JSON"),
        (b'{\n"a": x}', "line 2: not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "not valid JSON: Exceeds the limit"),
        (b'"a"\n"\xff"', "line 2: not UTF-8"),
        (b"", "line 1: not valid JSON"),
    ],
)
def test_what_is_no_json_is_said_in_one_short_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UnusableFile) as caught:
        read_json(tmp_path / "a.json")
    assert words in str(caught.value) and str(tmp_path / "a.json") in str(caught.value)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(UnusableFile, match="NUL"):
        read_bytes(f"{tmp_path}/a\0b")
    with pytest.raises(UnusableFile, match="surrogate"):
        read_bytes(f"{tmp_path}/\ud800")


def test_a_high_limit_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    tracemalloc.start()
    try:
        read_bytes(tmp_path / "a", 1 << 40)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("link", ["symbolic", "hard"])
@pytest.mark.parametrize("name", ["a.json", ".a.json.partial"])
def test_writing_follows_no_link(tmp_path: Path, link: str, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    if link == "symbolic":
        (folder / name).symlink_to(outside)
    else:
        os.link(outside, folder / name)
    write_whole(folder / "a.json", "new")
    assert outside.read_text() == "mine"
    assert (folder / "a.json").read_text() == "new" and not (folder / "a.json").is_symlink()
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_new_file_never_writes_into_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    os.link(tmp_path / "a", tmp_path / "other_name")
    with new_file(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_text() == "new" and (tmp_path / "other_name").read_text() == "old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), new_file(tmp_path / "folder"):
        raise AssertionError("opened")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_gets_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(number, "refused")))
    fsync_folder(tmp_path)


def test_a_folder_that_cannot_be_synced_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        fsync_folder(tmp_path)


LOOKS = (exists, is_dir, is_file, is_link)


def test_what_is_there_is_told_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name, target in (
        ("to-file", "file"),
        ("to-folder", "folder"),
        ("to-nothing", "gone"),
        ("loop", "loop"),
    ):
        (tmp_path / name).symlink_to(target)
    found = {
        name: "".join("01"[look(tmp_path / name)] for look in LOOKS)
        for name in ("folder", "file", "pipe", "to-file", "to-folder", "to-nothing", "loop", "gone", "file/x")
    }
    assert found == {
        "folder": "1100", "file": "1010", "pipe": "1000", "to-file": "1011", "to-folder": "1101",
        "to-nothing": "0001",
        "loop": "0001", "gone": "0000", "file/x": "0000",
    }  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOMEM, errno.ETIMEDOUT])
def test_a_look_that_the_disk_does_not_answer_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Any, number: int
) -> None:
    """``Path.exists`` of some versions of Python takes it for "no such file"."""
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    left = [3]
    for call in ("stat", "lstat"):
        real = getattr(os, call)

        def fails(path: Any, *more: Any, real: Any = real, **named: Any) -> os.stat_result:
            if left[0] and str(path) == str(tmp_path):
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *more, **named)

        monkeypatch.setattr(os, call, fails)
    assert look(tmp_path) == (look in (exists, is_dir)) and left == [0]
    left[0] = 4
    with pytest.raises(TryAgain, match=str(tmp_path)) as told:
        look(tmp_path)
    assert told.value.exit_code == 1


def test_what_may_not_be_looked_at_or_cannot_be_called_so_stays_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no file can be called so"):
        exists("a\0b")

    def refused(path: Any, *_: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(UserError, match=r"Permission denied.*check the path and its permissions") as told:
        exists(tmp_path / "x")
    assert told.value.exit_code == 78


def test_links_are_refused_wherever_they_lead(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "gone"):
        refuse_link(path, "and that is bad")
    for name, target in (("to-folder", "folder"), ("to-nothing", "gone"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UnusableFile, match=f"{name}: a link, and that is bad"):
            refuse_link(tmp_path / name, "and that is bad")
