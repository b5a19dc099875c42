"""Writing a file of records anew: nothing is lost in between, whatever the disk can do, and whenever it
fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_lpa import records
from megatron_lpa.errors import UserError
from megatron_lpa.evaluate.metrics_file import read_metrics
from megatron_lpa.records import Kept, Steps, keep_records
from megatron_lpa.run_folder import METRICS

ASIDE = "metrics.damaged.jsonl"
NO_RECORD = b"no record\n"


def line(step: int, kind: str = "train") -> bytes:
    return json.dumps({"kind": kind, "step": step, "tokens": 1, "loss": 1.0, "step_ms": 1.0}).encode() + b"\n"


DAMAGED = line(1) + NO_RECORD + line(2)
MENDED = line(1) + line(2)


@pytest.fixture(params=["links", "no links"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A damaged file, on a file system with hard links and on one without."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refused)
    (tmp_path / METRICS).write_bytes(DAMAGED)
    return tmp_path / METRICS


def kept(path: Path) -> Kept:
    return keep_records(path, lambda record: True, ASIDE)


def names(folder: Path) -> set[str]:
    return {found.name for found in folder.iterdir()}


class Killed(BaseException):
    """Nothing tidies after it."""


def killed_or_failing(
    call: str, at: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    real, calls = getattr(os, call), [0]

    def does(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(os, call, does)
    return monkeypatch


@pytest.mark.parametrize(
    ("call", "at"), [("fsync", 1), ("fsync", 2), ("rename", 1), ("replace", 1), ("unlink", 1), ("unlink", 2)]
)
def test_a_kill_at_any_instant_leaves_the_file(
    path: Path, call: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records, "_remove", lambda _: None)
        killed_or_failing(call, at, Killed(), patch)
        try:
            kept(path)
        except Killed:
            assert path.read_bytes() in (DAMAGED, MENDED)
    kept(path)
    assert path.read_bytes() == MENDED
    assert (path.parent / ASIDE).read_bytes() == DAMAGED
    assert names(path.parent) == {METRICS, ASIDE}


def test_many_failing_attempts_leave_one_copy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for _ in range(4):
            killed_or_failing("replace", 1, OSError(errno.EIO, "Input/output error"), patch)
            with pytest.raises(OSError):
                kept(path)
            patch.undo()
            assert path.read_bytes() == DAMAGED and names(path.parent) <= {METRICS, ASIDE}
    damage = kept(path).damage
    assert damage is not None and damage.endswith(f"the file as it was is {ASIDE}")
    assert path.read_bytes() == MENDED and names(path.parent) == {METRICS, ASIDE}
    assert (path.parent / ASIDE).read_bytes() == DAMAGED


def test_another_file_with_that_name_is_left_alone(path: Path) -> None:
    (path.parent / ASIDE).write_bytes(DAMAGED.swapcase())
    damage = kept(path).damage
    assert damage is not None and damage.endswith("the file as it was is metrics.damaged.2.jsonl")
    assert (path.parent / ASIDE).read_bytes() == DAMAGED.swapcase()
    assert (path.parent / "metrics.damaged.2.jsonl").read_bytes() == DAMAGED


def test_one_that_may_not_be_read_is_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path.parent / ASIDE).write_bytes(DAMAGED)
    real = records.sha256

    def refused(asked: Path) -> str:
        if asked.name == ASIDE:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(asked)

    monkeypatch.setattr(records, "sha256", refused)
    kept(path)
    assert path.read_bytes() == MENDED
    assert names(path.parent) == {METRICS, ASIDE, "metrics.damaged.2.jsonl"}


def test_what_was_done_is_said_where_the_folder_cannot_be_brought_to_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(records, "fsync_folder", fails)
    found = kept(path)
    assert found.damage is not None and found.last_step == 2
    assert found.not_on_disk is not None and found.not_on_disk.errno == errno.EIO
    assert path.read_bytes() == MENDED


@pytest.mark.parametrize(
    ("content", "good"),
    [
        ({"step": 1, "kind": "of a later version"}, True),
        ({"step": 1, "kind": "event"}, True),
        ({"step": 1, "kind": "train", "tokens": 1, "step_ms": 1, "loss": None}, True),
        ({"step": 1, "kind": "train", "tokens": 1, "step_ms": 1, "loss": float("nan")}, True),
        ({"step": 1, "kind": "train", "tokens": 1, "step_ms": 1}, False),
        ({"step": 1, "kind": "train", "tokens": 1, "loss": 1}, False),
        ({"step": 1, "kind": "valid", "tokens": None, "loss": 1}, False),
        ({"step": 1, "kind": "test", "tokens": 1, "loss": True}, False),
        ({"step": -1, "kind": "of a later version"}, False),
    ],
)
def test_what_a_start_keeps_is_what_the_tools_read(
    tmp_path: Path, content: dict[str, Any], good: bool
) -> None:
    path = tmp_path / METRICS
    path.write_bytes(line(1) + json.dumps(content).encode() + b"\n" + line(2))
    if not good:
        with pytest.raises(UserError, match=rf"{METRICS}:2: .*; mend or remove the line"):
            read_metrics(tmp_path)
    assert (kept(path).damage is None) == good
    assert len(read_metrics(tmp_path)) == 2 + good


def steps_of(*steps: float, kind: str = "train") -> Steps:
    found = Steps()
    for step in steps:
        found.add({"kind": kind, "step": step})
    return found


def test_whether_a_step_has_a_record_is_known() -> None:
    for held in ((), (8,), (4, 8, 12), (5, 10, 30, *range(50, 106, 5), 7)):
        found = steps_of(*held, kind="valid")
        assert [step for step in range(120) if found.has("valid", step)] == sorted(held)
        assert not found.has("test", 8) and not found.has("of a later version", 8)


def test_missing_steps_are_named() -> None:
    written = steps_of(*range(10, 101, 10), 105, 5, 5)
    assert written.missing_in(written) == ""
    assert written.missing_in(steps_of(5, *range(10, 101, 10), 105)) == "", "in whatever order"
    assert written.missing_in(steps_of(*range(30, 101, 10), 105)) == "train records of steps 5 to 20"
    assert written.missing_in(steps_of(5, 10, 30, *range(50, 106, 5))) == "train records of steps 20 and 40"
    assert steps_of(3).missing_in(steps_of(3, kind="valid")) == "train records of step 3"
    assert (
        steps_of(*range(9)).missing_in(steps_of(1, 3, 5, 7))
        == "train records of steps 0 and 2 and 4 and 2 more"
    )
    assert steps_of(1, kind="of a later version").missing_in(steps_of()) == ""


def test_steps_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    many = steps_of(*range(0, 1_000_000, 10))
    assert sum(map(len, many._sequences.values())) == 1
    monkeypatch.setattr(records, "_MOST_SEQUENCES", 5)
    odd = steps_of(*(step**2 for step in range(1000)))
    assert sum(map(len, odd._sequences.values())) == 5
    assert odd.missing_in(steps_of()).endswith("998001")
