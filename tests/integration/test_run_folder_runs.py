"""Run folders from strangers, and under the hands of others: what a whole run does to them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest
from launching import SMALL, TIMEOUT_S, Launch, launch, records

TOP = ["checkpoints", "logs", "tokenizer", "tensorboard", "wandb", "snapshot"]
INSIDE = [
    ".lock", "metrics.jsonl", ".metrics.jsonl.partial", "metrics.partial", "config.yaml", "wandb_id",
    "tokenizer/tokenizer.json",
    "checkpoints/passed_over.json", "checkpoints/.passed_over.json", "logs/hang/rank_00000.json",
    "logs/hang/rank_00000.txt",
]  # fmt: skip
INSIDE_FOLDERS = [
    "checkpoints/step_00000002",
    "checkpoints/.step_00000004.partial",
    "checkpoints/.step_00000001.removed",
]


def arguments(name: str, *more: str) -> list[str]:
    return [*SMALL, "--data.prefix", "data", "--logging.name", name, *more]


def contents(folder: Path) -> dict[str, str]:
    """Everything below a folder: names, links, and hashes of files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("where", ["top", "inside"])
def test_nothing_is_written_through_links(folder: Path, where: str) -> None:
    run, outside = folder / "runs" / f"linked-{where}", folder / f"outside-{where}"
    for name in TOP if where == "top" else [*INSIDE_FOLDERS, *INSIDE]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        target = outside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in INSIDE:
            target.write_text("of somebody else")
        else:
            (target / "precious").mkdir(parents=True)
        (run / name).symlink_to(target)
    before, inside = contents(outside), contents(run)
    more = [
        "--logging.tensorboard",
        "true",
        "--train.checkpoint_interval",
        "2",
        "--train.keep_checkpoints",
        "1",
    ]
    finished = launch(arguments(run.name, *more), 1, folder)
    assert finished.codes == [78], finished.stderr
    assert contents(outside) == before
    assert contents(run) == inside, "and nothing inside either, before it is refused"
    (error,) = finished.errors
    assert any(f"runs/{run.name}/{name}: a link to " in error for name in [*TOP, *INSIDE, *INSIDE_FOLDERS])
    assert "Traceback" not in finished.stderr[0]


def test_files_with_another_name_elsewhere_keep_their_contents_there(folder: Path) -> None:
    """As in a copy made with ``cp -al``: the run goes on, and back to a checkpoint, and the copy stays."""
    more = [
        "--train.checkpoint_interval",
        "2",
        "--train.keep_checkpoints",
        "1",
        "--train.max_skipped_steps",
        "2",
    ]
    begun = launch(arguments("copied", *more, "--train.steps", "4"), 1, folder)
    assert begun.codes == [0], begun.stderr
    run, copy = folder / "runs" / "copied", folder / "copy"
    (run / "checkpoints" / "passed_over.json").write_text("{}")
    shutil.copytree(run, copy, copy_function=os.link)
    (run / "checkpoints" / "passed_over.json").unlink()
    os.link(copy / "config.yaml", run / "checkpoints" / ".passed_over.json.partial")
    before = contents(copy)
    assert len([name for name, what in before.items() if what != "folder"]) > 6
    finished = launch(arguments("copied", *more), 1, folder, {6: "nan", 7: "nan"})
    assert finished.codes == [0], finished.stderr
    assert "went back to step_00000006" in finished.stderr[0]
    assert (run / "checkpoints" / "step_00000008").is_dir()
    assert contents(copy) == before
    shared = [path for path in run.rglob("*") if path.is_file() and path.stat().st_nlink > 1]
    assert shared == []


def long_run(folder: Path, name: str, processes: int, *more: str) -> tuple[Launch, Path]:
    """A run that has written records."""
    run = folder / "runs" / name
    started = Launch(
        arguments(name, "--train.steps", "100000", "--train.eval_interval", "0", *more), processes, folder
    )
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run, "train")) > 2)
    except BaseException:
        for process in started.processes:
            process.kill()
        raise
    return started, run


def wait_for(condition) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lock_and_records_that_are_removed_come_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, run = long_run(folder, "removed", 1)
    (run / ".lock").unlink()
    (run / "metrics.jsonl").unlink()
    second = launch(arguments("removed", "--train.lock_wait_s", "0"), 1, folder)
    assert second.codes == [1] and "another run is writing here" in second.errors[0]
    first.processes[0].terminate()
    finished = first.wait()
    assert finished.codes == [128 + 15], finished.stderr
    steps = [record["step"] for record in records(run, "train")]
    assert steps == list(range(1, len(steps) + 1))
    assert f"{Path('runs/removed/.lock')}: was removed" in finished.stderr[0]
    assert any("is written again with all its records" in event["message"] for event in records(run, "event"))


def test_a_run_whose_folder_another_one_took_ends_on_all_ranks_and_writes_no_more(folder: Path) -> None:
    started, run = long_run(folder, "taken", 2)
    other = run / "other"
    with open(other, "w") as lock:
        lock.write("process 5 on nowhere\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.replace(other, run / ".lock")
        finished = started.wait()
    assert finished.codes == [1, 1], finished.stderr
    assert len(finished.errors) == 1
    assert "another run has taken this folder over (process 5 on nowhere)" in finished.errors[0]
    assert list((run / "checkpoints").iterdir()) == []
    assert (run / ".lock").read_text() == "process 5 on nowhere\n"


def test_a_run_folder_that_is_moved_away_ends_the_run_on_all_ranks(folder: Path) -> None:
    started, run = long_run(folder, "moved", 2)
    run.rename(folder / "runs" / "elsewhere")
    finished = started.wait()
    assert finished.codes == [78, 78], finished.stderr
    (error,) = finished.errors
    assert "runs/moved: the run folder was moved or removed" in error and "runs/elsewhere now)" in error
    assert not run.exists(), "no half of a run is left under the old name"
    assert "Traceback" not in "".join(finished.stderr)


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [("moved", 78, "was moved or removed"), ("taken", 1, "another run has taken this folder over")],
)
def test_a_run_that_has_lost_its_folder_does_not_go_back_in_it(
    folder: Path, how: str, code: int, words: str
) -> None:
    """Retention would remove checkpoints that are another run's by now."""
    name = f"lost-{how}"
    more = [
        "--train.steps", "10", "--train.eval_interval", "0", "--train.checkpoint_interval", "2",
        "--train.keep_checkpoints", "1",
        "--train.max_skipped_steps", "2", "--train.checkpoint_overlap", "false",
    ]  # fmt: skip
    finished = launch(arguments(name, *more), 2, folder, {5: "nan", 6: how})
    assert finished.codes == [code, code], finished.stderr
    (error,) = finished.errors
    assert words in error and "went back" not in "".join(finished.stderr)
    run = folder / "runs" / (f"{name}.moved" if how == "moved" else name)
    left = ["step_00000006"] if how == "moved" else ["step_00000002", "step_00000006"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == left
    assert (folder / "runs" / name).exists() == (how == "taken")


def test_a_run_folder_that_is_moved_amid_a_save_is_not_made_again(folder: Path) -> None:
    more = ["--train.checkpoint_interval", "2", "--train.checkpoint_overlap", "false"]
    finished = launch(arguments("saving", *more), 1, folder, {"write": "moved"})
    assert finished.codes == [78], finished.stderr
    (error,) = finished.errors
    assert "runs/saving: the run folder was moved or removed" in error
    assert not (folder / "runs" / "saving").exists()


def test_a_run_folder_that_is_moved_before_a_hang_is_not_made_again(folder: Path) -> None:
    finished = launch(arguments("hanging", "--train.step_timeout_s", "6"), 1, folder, {"3": "moved, hang"})
    assert finished.codes == [75], finished.stderr
    assert "rank 0" in finished.errors[0] and "read_batches" in finished.stderr[0], (
        "its stacks are on stderr instead"
    )
    assert not (folder / "runs" / "hanging").exists()
