"""Preprocessing that is killed, meets a full disk, or loses a worker: nothing is lost and nothing
half-written looks whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.preprocessing import TOOL, alive, children, in_this_process, run_tool, wait_for, write_jsonl

from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.storage.partial_file import PartialFile, WrittenElsewhere
from megatron_lpa.data.tokenizers.fast import WrongIdsError
from megatron_lpa.errors import UserError
from megatron_lpa.preparation import preprocess as preprocess_module
from megatron_lpa.preparation.encode import encode_task
from megatron_lpa.preparation.preprocess import preprocess
from megatron_lpa.preparation.preprocess_config import PreprocessConfig


@pytest.fixture(scope="module")
def long_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 MB whose last lines are bad."""
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    path.write_bytes(corpus.read_bytes() * 30 + b'{"text": 1}\nnot JSON \xff\n{"text": "last"}\n')
    return path


@pytest.fixture(scope="module")
def undisturbed(long_corpus: Path, bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what an undisturbed run makes of the long corpus."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_tool(*job(long_corpus, bpe_folder, folder)).returncode == 3
    return folder


def job(corpus: Path, tokenizer: Path, folder: Path) -> list[str]:
    arguments = ["--input", str(corpus), "--tokenizer", str(tokenizer), "--output-prefix", str(folder / "x")]
    arguments += ["--workers", "2", "--append-eod", "--on-bad-line", "skip", "--engine", "reference"]
    return [*arguments, "--commit-interval", "0.01", "--log-interval", "1"]


linux = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="looks at processes through Linux's /proc"
)


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(
    long_corpus: Path, bpe_folder: Path, undisturbed: Path, tmp_path: Path, how: signal.Signals
) -> None:
    moments = random.Random(how)
    command = [sys.executable, str(TOOL), *job(long_corpus, bpe_folder, tmp_path)]
    documents_before, kills = 0, 6
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.match(r"going on after (\d+) documents", first)
        if found:  # nothing that the ledger held is done again
            assert int(found[1]) >= documents_before
            documents_before = int(found[1])
        if moments.random() < 0.7:
            process.stderr.readline()  # more tokens are written
        workers = children(process.pid)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(how)
        assert "Traceback" not in without_unborn_workers(first + process.stderr.read(), how)
        assert process.wait(timeout=60) not in (0, 1, 3), "finished before it was killed"
        if not (tmp_path / "x_text_document.json").exists():
            with pytest.raises(UserError):  # nothing half-written looks whole
                IndexedDataset(tmp_path / "x_text_document")
        wait_for(lambda: not any(alive(pid) for pid in workers), "workers outlived the run")  # noqa: B023
    assert documents_before > 0
    assert run_tool(*command[2:]).returncode == 3
    compare_folders(tmp_path, undisturbed)
    rejected = [json.loads(line) for line in (tmp_path / "x.rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == [
        len(long_corpus.read_bytes().splitlines()) - 2,
        len(long_corpus.read_bytes().splitlines()) - 1,
    ]
    assert rejected[0]["record"] == '{"text": 1}' and "record_base64" in rejected[1]


def without_unborn_workers(output: str, how: signal.Signals) -> str:
    """Output without what Python says of a worker whose parent was killed while it started: that nobody can
    prevent."""
    if how != signal.SIGKILL:
        return output
    unborn = r'Traceback \(most recent call last\):\n  File "<string>", line 1, in <module>\n(  .*\n)+?EOFError: Ran out of input\n'  # noqa: E501
    return re.sub(unborn, "", output)


def compare_folders(folder: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fault", ["killed", "signal", "error"])
def test_a_fault_between_any_two_system_calls_of_publication_is_recovered(
    corpus: Path, bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Every rename, removal and flush to disk in turn is the last of a killed run, or is where it is
    stopped."""

    def config(folder: Path) -> PreprocessConfig:
        return PreprocessConfig(
            f"{folder}/x",
            str(bpe_folder),
            (str(source),),
            json_keys=("text", "other"),
            engine="reference",
            log_interval=0,
            on_bad_line="skip",
            overwrite=True,
        )

    records = [{"text": f"document {i}", "other": f"{i} is a number"} for i in range(50)]
    source = write_jsonl(tmp_path / "in.jsonl", [*records, {"text": "no other"}])
    (tmp_path / "expected").mkdir()
    monkeypatch.setattr(preprocess_module, "ordered_map", in_this_process)
    preprocess(config(tmp_path / "expected"))
    real = {name: getattr(os, name) for name in ("replace", "unlink", "rename", "fsync")}
    for last_call in range(200):
        folder = tmp_path / str(last_call)
        folder.mkdir()
        calls = 0

        def counted(name: str) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == last_call + 1 or (fault == "killed" and calls > last_call):  # noqa: B023 - same turn
                    raise {
                        "killed": Killed(),
                        "signal": SystemExit(143),
                        "error": OSError(errno.EROFS, "no"),
                    }[fault]
                return real[name](*arguments, **options)

            return call

        for name in real:
            monkeypatch.setattr(os, name, counted(name))
        try:
            preprocess(config(folder))
            finished = True
        except (Killed, SystemExit, UserError, OSError):
            finished = False
        for name, function in real.items():
            monkeypatch.setattr(os, name, function)
        if not finished:
            preprocess(config(folder))
        compare_folders(folder, tmp_path / "expected")
        if finished:
            break
    assert finished and last_call > 15


def test_unfinished_work_of_another_call_is_neither_mixed_in_nor_lost(
    long_corpus: Path, bpe_folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    arguments = job(long_corpus, bpe_folder, tmp_path)
    process = subprocess.Popen([sys.executable, str(TOOL), *arguments], stderr=subprocess.PIPE)
    assert process.stderr is not None
    for _ in range(3):
        process.stderr.readline()
    process.terminate()
    process.communicate()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "x.ledger.partial" in before
    for change, message in (
        (["--json-keys", "body"], "json keys was text, and now body"),
        (["--drop-subsets", "Github"], "dropped subsets was none, and now Github"),
        (["--input", str(bpe_folder / "../text.jsonl")], "the input "),
    ):
        refused = run_tool(*arguments, *change)
        assert refused.returncode == 78 and message in refused.stderr and "--restart" in refused.stderr
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run_tool(*arguments, "--restart").returncode == 3
    compare_folders(tmp_path, undisturbed)


@linux
def test_a_dead_worker_ends_the_run_instead_of_hanging_it(
    long_corpus: Path, bpe_folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(TOOL), *job(long_corpus, bpe_folder, tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a worker process died" in errors
    assert run_tool(*job(long_corpus, bpe_folder, tmp_path)).returncode == 3
    compare_folders(tmp_path, undisturbed)


def test_no_room_on_the_disk_is_said_plainly(corpus: Path, bpe_folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk: writing fails in the same place."""
    result = run_tool(
        *("--input", corpus, "--tokenizer", bpe_folder, "--workers", 1, "--output-prefix", tmp_path / "x"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 1
    assert "x_text_document.bin.partial: no room to write" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_ids_found_wrong_are_not_kept_for_the_next_run(
    long_corpus: Path, bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def caught(task: Any) -> Any:
        nonlocal tasks
        tasks += 1
        if tasks == 3:
            raise WrongIdsError("other ids; start again with --engine reference")
        return encode_task(task)

    tasks = 0
    monkeypatch.setattr(preprocess_module, "ordered_map", in_this_process)
    monkeypatch.setattr(preprocess_module, "encode_task", caught)
    config = PreprocessConfig(
        f"{tmp_path}/x", str(bpe_folder), (str(long_corpus),), commit_interval_s=1e-9, on_bad_line="skip"
    )
    with pytest.raises(WrongIdsError):
        preprocess(config)
    assert tasks == 3 and list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_one_file_still_has_one_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = PartialFile.open(tmp_path / "x")
    with pytest.raises(WrittenElsewhere, match=r"x\.partial\.lock exists"):
        PartialFile.open(tmp_path / "x")
    first.write(b"whole")
    first.finish()
    first.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    PartialFile.open(tmp_path / "x").discard()
    assert (tmp_path / "x").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1
