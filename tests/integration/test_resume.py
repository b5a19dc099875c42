"""Whole runs that go on in another layout, past damage, and on a disk that is full for a while."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from launching import SMALL, launch, records

from megatron_lpa.checkpoint.manifest import complete_checkpoints
from megatron_lpa.run_folder import MANIFEST


def arguments(name: str, *more: str) -> list[str]:
    return [
        *SMALL, "--data.prefix", "data", "--data.split", "80,10,10", "--optim.decay_steps", "8",
        "--logging.name", name, *more,
    ]  # fmt: skip


def steps_of(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_checkpoints(run / "checkpoints")]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """Eight steps in one process, with a checkpoint every two and a validation every four."""
    saving = ["--train.checkpoint_interval", "2", "--train.keep_checkpoints", "0"]
    finished = launch(arguments("undisturbed", *saving), 1, folder)
    assert finished.codes == [0], finished.stderr
    return folder / "runs" / "undisturbed"


def copy_until(undisturbed: Path, name: str, step: int) -> Path:
    """The run as it was after ``step`` steps."""
    run = undisturbed.with_name(name)
    shutil.copytree(undisturbed, run)
    for checkpoint in complete_checkpoints(run / "checkpoints"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    return run


def test_a_run_goes_on_through_three_other_layouts_with_the_same_curve(folder, undisturbed):
    copy_until(undisturbed, "moving", 2)
    legs = [
        (4, 2, ["--train.deepspeed_config", "zero1", "--parallel.lowdim_layout", "column_row"]),
        (6, 2, ["--parallel.tensor_parallel_size", "2", "--model.pad_vocab_to_multiple_of", "2"]),
        (8, 4, ["--parallel.tensor_parallel_size", "2", "--model.pad_vocab_to_multiple_of", "4",
                "--train.deepspeed_config", "zero2", "--train.micro_batch_size", "4"]),
    ]  # fmt: skip
    for last, processes, more in legs:
        finished = launch(arguments("moving", "--train.steps", str(last), *more), processes, folder)
        assert finished.codes == [0] * processes, finished.stderr
        assert f"at step {last - 2}" in finished.stdout[0]
        assert "the state is brought into another layout: layout." in finished.stdout[0]
    run = folder / "runs" / "moving"
    for kind in ("train", "valid", "test"):
        expected = {r["step"]: r["loss"] for r in records(undisturbed, kind)}
        found = {r["step"]: r["loss"] for r in records(run, kind)}  # each leg validates at its end, too
        assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-5)
    samples = {r["step"]: r["samples"] for r in records(undisturbed, "train")}
    assert {r["step"]: r["samples"] for r in records(run, "train")} == samples


def test_a_damaged_checkpoint_is_skipped_with_a_word_and_the_run_ends_the_same(folder, undisturbed):
    run = copy_until(undisturbed, "damaged", 6)
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    victim = next((run / "checkpoints" / "step_00000006" / "state").iterdir())
    victim.write_bytes(victim.read_bytes()[:-8])
    finished = launch(arguments("damaged"), 1, folder)
    assert finished.codes == [0], finished.stderr
    assert "step_00000006 was skipped: " in finished.stdout[0] and victim.name in finished.stdout[0]
    assert "at step 4" in finished.stdout[0]
    curve = [(r["step"], r["loss"], r["grad_norm"]) for r in records(undisturbed, "train")]
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in records(run, "train")] == curve
    assert any("step_00000006 was skipped" in r["message"] for r in records(run, "event"))
    assert (run / "checkpoints" / "damaged_step_00000006" / "DAMAGED.txt").is_file()
    assert steps_of(run)[-1] == 8


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_by_itself(folder, undisturbed):
    run = copy_until(undisturbed, "lost", 4)
    for checkpoint in complete_checkpoints(run / "checkpoints"):
        (checkpoint / MANIFEST).unlink()
    metrics = (run / "metrics.jsonl").read_text()
    for _ in range(2):  # and not the second time either
        refused = launch(arguments("lost"), 1, folder)
        assert refused.codes == [78] and len(refused.errors) == 1
        assert "holds no checkpoint that is intact" in refused.errors[0]
        assert "start anew under another logging.name" in refused.errors[0]
    for checkpoint in list((run / "checkpoints").iterdir()):
        checkpoint.rename(checkpoint.with_name(f"damaged_{checkpoint.name}"))
    refused = launch(arguments("lost"), 1, folder)
    assert refused.codes == [78] and "holds only damaged checkpoints" in refused.errors[0]
    assert (run / "metrics.jsonl").read_text() == metrics


def test_resume_must_makes_no_folder_before_it_refuses(folder):
    refused = launch(arguments("not-there", "--train.resume", "must"), 2, folder)
    assert refused.codes == [78, 78] and len(refused.errors) == 1
    assert "train.resume=auto" in refused.errors[0]
    assert not (folder / "runs" / "not-there").exists()


def test_the_best_and_every_nth_stay(folder):
    keeping = [
        "--train.checkpoint_interval", "1", "--train.keep_checkpoints", "1", "--train.keep_every", "3",
        "--train.keep_best", "true", "--train.eval_interval", "2", "--train.steps", "7",
        "--optim.lr", "0.3", "--optim.schedule", "constant",
    ]  # fmt: skip
    finished = launch(arguments("keeping", *keeping), 1, folder)
    assert finished.codes == [0], finished.stderr
    run = folder / "runs" / "keeping"
    losses = {r["step"]: r["loss"] for r in records(run, "valid")}
    assert list(losses) == [2, 4, 6, 7]
    best = min(losses, key=lambda step: losses[step])
    assert steps_of(run) == sorted({3, 6, 7, best})
    manifest = json.loads((run / "checkpoints" / f"step_{best:08d}" / MANIFEST).read_text())
    assert manifest["validation_loss"] == losses[best]


def test_keeping_the_best_needs_validation(folder):
    refused = launch(arguments("no", "--train.keep_best", "true", "--train.eval_interval", "0"), 1, folder)
    assert refused.codes == [78]
    assert "train.keep_best needs validation losses but train.eval_interval is 0" in refused.errors[0]


FULL_UNTIL_STEP_4 = """
import sys
if "megatron_lpa.pretrain" in sys.orig_argv:
    from megatron_lpa.checkpoint import saving
    real = saving.write_tensors
    def write_tensors(folder, *arguments):
        if int(folder.name.split("_")[1].split(".")[0]) <= 4:
            with open("/dev/full", "w") as file:
                file.write("x")
        return real(folder, *arguments)
    saving.write_tensors = write_tensors
"""


def test_a_memory_that_cannot_be_used_is_refused_before_anything_is_set_aside(folder):
    """A damaged checkpoint is renamed when an older one is loaded; a start that is refused renames
    nothing."""
    run = folder / "runs" / "remembers"
    more = ["--train.checkpoint_interval", "2", "--train.keep_checkpoints", "0", "--train.steps", "4"]
    assert launch(arguments("remembers", *more), 1, folder).codes == [0]
    newest = run / "checkpoints" / "step_00000004"
    next(newest.glob("state/*")).unlink()
    (run / "checkpoints" / "passed_over.json").write_text("{}")
    before = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    refused = launch(arguments("remembers", *more), 1, folder)
    assert refused.codes == [78] and "passed_over.json" in refused.errors[0]
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == before


@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_a_disk_that_is_full_for_a_while(folder, tmp_path, choice, monkeypatch):
    """Writes of states up to step 4 go to a device that is always full."""
    (tmp_path / "sitecustomize.py").write_text(FULL_UNTIL_STEP_4)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    name = f"full-{choice}"
    more = ["--train.checkpoint_interval", "2", "--train.on_checkpoint_failure", choice]
    finished = launch(arguments(name, *more), 2, folder)
    run = folder / "runs" / name
    if choice == "stop":
        assert finished.codes == [78, 78]
        assert len(finished.errors) == 1 and "the checkpoint could not be written" in finished.errors[0]
        assert "No space left" in finished.errors[0]
        assert list((run / "checkpoints").iterdir()) == []
        return
    assert finished.codes == [0, 0], finished.stderr
    assert steps_of(run) == [6, 8]
    warnings = re.findall(r"^warning: step \d: the checkpoint could not be written", finished.stderr[0], re.M)
    assert len(warnings) == 2 and "training goes on" in finished.stderr[0]
    assert "could not be written" not in finished.stderr[1]
    assert sum("checkpoint failed" in r["message"] for r in records(run, "event")) == 2


def test_data_that_cannot_be_read_for_a_while_costs_no_step(folder):
    """All processes agree on it between two steps, so what was trained until then is saved."""
    saving = ["--train.checkpoint_interval", "4", "--train.keep_checkpoints", "0"]
    stopped = launch(arguments("unreadable", *saving), 2, folder, {6: "unreadable"})
    assert stopped.codes == [1, 1], stopped.stderr
    assert stopped.errors == ["error: rank 1: data.bin: Input/output error"]
    run = folder / "runs" / "unreadable"
    assert steps_of(run) == [4, 6]
    assert launch(arguments("unreadable", *saving), 2, folder).codes == [0, 0]
    assert [record["step"] for record in records(run, "train")] == list(range(1, 9))
