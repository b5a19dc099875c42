"""Links, pipes, other options and a disk that hiccups: what is done to a run, and what is taken for a broken
promise."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fault_injection import judge
from fault_injection.fault_plan import Fault
from fault_injection.interposed import Disk
from fault_injection.kinds import MALFORMED
from fault_injection.malformed import malform
from fault_injection.one_start import Result, Start, path_pattern
from fault_injection.planting import Planted, of_mismatch, of_planted, refusal, tree
from megatron_lpa import files
from megatron_lpa.errors import TryAgain

# Planted links and pipes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


WRITES: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "through a symbolic link": ("symbolic", "metrics.jsonl", lambda path: path.write_text("more")),
    "into a hard link": ("hard", "metrics.jsonl", lambda path: os.truncate(path, 0)),
    "where a link leads nowhere": ("dangling", "metrics.partial", lambda path: path.write_text("new")),
    "into a linked folder": ("folder", "checkpoints", lambda path: (path / "step_1").mkdir()),
    "a file into a linked folder": ("folder", "logs", lambda path: (path / "a.txt").write_text("new")),
    "removal in a linked folder": ("folder", "checkpoints", lambda path: (path / "other.txt").unlink()),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_through_a_link_is_found_out(name: str, run: Path, tmp_path: Path) -> None:
    sort, at, write = WRITES[name]
    planted = Planted(run, sort, at, tmp_path / "aside")
    assert planted.changed_outside() == []
    write(run / at)
    assert planted.changed_outside()


@pytest.mark.parametrize("sort", ["symbolic", "hard", "dangling", "pipe", "folder"])
def test_what_was_planted_goes_and_what_had_the_name_comes_back(sort: str, run: Path, tmp_path: Path) -> None:
    before = tree(run)
    planted = Planted(run, sort, "checkpoints" if sort == "folder" else "metrics.jsonl", tmp_path / "aside")
    if sort != "hard":
        assert tree(run) != before
    planted.remove()
    assert tree(run) == before and not (tmp_path / "aside").exists()
    assert (run / "metrics.jsonl").stat().st_nlink == 1 and not (run / "checkpoints").is_symlink()


def test_what_the_run_put_in_place_of_a_link_stays(run: Path, tmp_path: Path) -> None:
    planted = Planted(run, "symbolic", "metrics.jsonl", tmp_path / "aside")
    files.write_whole(run / "metrics.jsonl", "the run's own")
    assert planted.changed_outside() == []
    planted.remove()
    assert (run / "metrics.jsonl").read_text() == "the run's own"


def test_a_refusal_is_one_line_with_the_right_code_and_name_in_time() -> None:
    good = ["error: run/metrics.jsonl: a link; remove it\nexit code 78: the same\n", ""]
    assert refusal([78, 78], good, 2.0, 30.0) == [] and of_planted(good, "metrics.jsonl") == []
    assert "78 was due" in refusal([78, 1], good, 2.0, 30.0)[0]
    assert "took 31 s" in refusal([78, 78], good, 31.0, 30.0)[0]
    assert "traceback" in refusal([78, 78], ["Traceback (most recent call last):\n"], 2.0, 30.0)[0]
    assert "does not name .lock" in of_planted(good, ".lock")[0]
    assert "2 lines" in of_planted([good[0], good[0]], "metrics.jsonl")[0]
    # Before ranks have met, each tells for itself.
    named = "error: rank 1 (node): run/metrics.jsonl: a link; remove it\n"
    assert of_planted([good[0], named], "metrics.jsonl") == []
    assert "2 lines" in of_planted([good[0], named.replace("link", "pipe")], "metrics.jsonl")[0]
    assert "0 lines" in of_planted(["", ""], "metrics.jsonl")[0]


def test_a_mismatch_has_to_name_the_rank_and_the_key() -> None:
    line = "error: rank 1: train.seed is 77, where rank 0 has 1234\n"
    assert of_mismatch([line, ""], 1, "train.seed") == []
    assert of_mismatch(["error: ranks 1, 3 have another train.seed\n"], 3, "train.seed") == []
    for said, rank in (
        (line, 2),
        ("error: rank 12 has another train.seed\n", 1),
        ("note: rank 1: train.seed", 1),
    ):
        assert "no line of an error names" in of_mismatch([said], rank, "train.seed")[0]
    assert of_mismatch([line], 1, "optim.lr") != []


# Manifests


def manifest() -> dict[str, Any]:
    return {
        "files": {"state/rank_00000.safetensors": {"bytes": 8, "sha256": "0" * 64}},
        "progress": {"step": 3, "consumed_samples": 24, "consumed_tokens": 384, "skipped_samples": 0},
        "layout": {"tensor_parallel_size": 1},
        "order": {"seed": 1},
        "model": {"num_layers": 1},
        "state": {"optimizer_step": 3, "parameters": {"w": {"shape": [4, 4], "tp_dim": None}}},
    }


@pytest.mark.parametrize("sort", [sort for sort in MALFORMED if sort != "a-list"])
def test_a_malformed_manifest_has_a_checksum_that_fits(sort: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**manifest(), "checksum": "x"}))
    malform(tmp_path, sort)
    content = json.loads(path.read_text())
    seal = content.pop("checksum")
    assert hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == seal
    assert content != manifest()


# The disk


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Events and places; what ``Disk.wrap`` replaces comes back at the end."""
    for owner, name in ((os, "open"), (os, "fdopen"), (os, "pread"), (builtins, "open"), (io, "open")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    yield []


def wrapped(
    told: list[Any], *errors: dict[str, Any], full: tuple[int, int] = (0, -1), held: str = ""
) -> Disk:
    disk = Disk(
        [{"id": 7, "nth": 1, "times": 1, "error": "ESTALE", **error} for error in errors],
        full,
        lambda **event: told.append(event),
        lambda place, step: told.append((place, step)),
        lambda place, step: place == held,
    )
    disk.wrap()
    return disk


def test_a_file_fails_as_often_as_was_asked_for_and_from_the_asked_time_on(
    told: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "data.idx"
    path.write_bytes(b"tokens")
    wrapped(told, {"path": path_pattern("idx", 0), "nth": 2, "times": 2})
    opened: list[int] = []
    for opener in (os.open, open, os.open, open):
        try:
            if opener is open:
                open(path, "rb").close()
            else:
                os.close(os.open(path, os.O_RDONLY))
            opened.append(0)
        except OSError as error:
            assert error.errno is not None and error.filename == str(path)
            opened.append(error.errno)
    assert opened == [0, errno.ESTALE, errno.ESTALE, 0]
    assert told == [{"event": "open-error", "id": 7, "path": str(path)}]


@pytest.mark.parametrize("error", ["ESTALE", "EIO", "EMFILE"])
def test_patient_reading_outlasts_two_failures_and_not_a_lasting_one(
    error: str, told: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints/step_00000006/manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text("[1]")
    pattern = path_pattern("manifest", 6)
    wrapped(told, {"path": pattern, "times": 2, "error": error})
    assert files.read_json(path) == [1]
    wrapped(told, {"path": pattern, "times": 0, "error": error})
    with pytest.raises(TryAgain, match="cannot be read"):
        files.read_json(path)
    (tmp_path / "checkpoints/step_00000003").mkdir()
    (tmp_path / "checkpoints/step_00000003/manifest.json").write_text("[2]")
    assert files.read_json(tmp_path / "checkpoints/step_00000003/manifest.json") == [2]
    path.write_text("writing is another matter")


def test_one_process_alone_has_a_fault_that_any_may_meet(told: list[Any], tmp_path: Path) -> None:
    path, token = tmp_path / "data.bin", str(tmp_path / "token")
    path.write_bytes(b"tokens")
    first = wrapped(told, {"path": "data", "times": 0, "once": token})
    with pytest.raises(OSError, match=r"(?i)stale"):
        first._open(path, "rb")
    second = wrapped(told, {"path": "data", "times": 0, "once": token})
    second._open(path, "rb").close()
    with pytest.raises(OSError, match=r"(?i)stale"):
        first._open(path, "rb")


def test_reading_tokens_ends_at_once_where_the_file_is_cut_short(told: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"tokens")
    disk = wrapped(told)
    with open(path, "rb") as file:
        with disk.cut_short(r"\.bin$"):
            assert os.pread(file.fileno(), 6, 0) == b""
        assert os.pread(file.fileno(), 6, 0) == b"tokens"


def test_a_checkpoint_being_written_is_held_and_torn_where_it_was_asked_for(
    told: list[Any], tmp_path: Path
) -> None:
    folder = tmp_path / ".step_00000003.partial"
    (folder / "state").mkdir(parents=True)
    wrapped(told, held="manifest-torn")
    content: list[bytes] = []

    def reach(place: str, step: int) -> None:
        content.append((folder / "manifest.json").read_bytes())

    disk = Disk([], (0, -1), lambda **event: None, reach, lambda place, step: place == "manifest-torn")
    told.clear()
    with files.new_file(folder / "state/rank_00000.safetensors") as file:
        for _ in range(3):
            file.write(b"ab")
    assert told == [("before-state", 3), ("state-torn", 3)]
    assert (folder / "state/rank_00000.safetensors").read_bytes() == b"ababab"
    (folder / "manifest.json").touch()
    with disk._open(folder / "manifest.json", "w") as text:
        text.write("0123456789")
    assert content[-1] == b"01234" and (folder / "manifest.json").read_text() == "0123456789"


def test_a_full_disk_takes_no_state(told: list[Any], tmp_path: Path) -> None:
    (tmp_path / ".step_00000006.partial/state").mkdir(parents=True)
    wrapped(told, full=(4, 9))
    with (
        pytest.raises(OSError, match="No space"),
        files.new_file(tmp_path / ".step_00000006.partial/state/a"),
    ):
        pass
    (tmp_path / ".step_00000012.partial/state").mkdir(parents=True)
    with files.new_file(tmp_path / ".step_00000012.partial/state/a") as file:
        file.write(b"room")


# What a start ends with


def ended(fault: Fault, codes: list[int], by_us: tuple[int, ...] = (), line: str = "") -> list[str]:
    """What is found wrong with a start that was struck by ``fault`` and ended so."""
    texts = [f"{line}\n" if line and rank == 0 else "" for rank in range(len(codes))]
    ranks = SimpleNamespace(codes=dict(enumerate(codes)), ended_by_us=set(by_us), text=lambda ending: texts)
    result = Result(fault, 1, "", 1, 0.0, 0)
    start = SimpleNamespace(
        ranks=ranks, hung=False, struck={fault.number: result}, trained=False, killed=set(), unreadable=None
    )
    return judge.of_start(cast(Start, start))


LASTING = Fault(1, "open-error-lasting", rank=1, variant="idx EIO")
ALONE = Fault(1, "open-error-lasting", rank=1, variant="config EIO")
HANG = Fault(1, "hang-start", rank=1)
STOP = Fault(1, "stop-between-bad", variant="SIGTERM", batch=4)
TERM = 128 + signal.SIGTERM
CANNOT = "error: data.idx: cannot be read"


@pytest.mark.parametrize(
    ("fault", "codes", "by_us", "line", "fine"),
    [
        (LASTING, [1, 1], (), CANNOT, True),
        (LASTING, [78, 78], (), CANNOT, False),
        (LASTING, [1, 78], (), CANNOT, False),
        (LASTING, [-15, 1], (0,), CANNOT, False),
        (ALONE, [-15, 1], (0,), CANNOT, True),
        (ALONE, [-15, 78], (0,), CANNOT, False),
        (ALONE, [1, -15], (1,), CANNOT, False),
        (HANG, [75, 75], (), "error: rank 1 is opening data", True),
        (HANG, [75, 1], (), "error: rank 1 is opening data", False),
        (STOP, [TERM, TERM], (), "", True),
        (STOP, [0, 0], (), "", False),
        (Fault(1, "open-error", variant="idx EIO", amount=1), [0, 0], (), "", True),
        (Fault(1, "open-error", variant="idx EIO", amount=1), [1, 1], (), CANNOT, False),
    ],
)
def test_exit_codes_are_held_against_what_struck(
    fault: Fault, codes: list[int], by_us: tuple[int, ...], line: str, fine: bool
) -> None:
    found = ended(fault, codes, by_us, line)
    assert (not found) == fine, found
