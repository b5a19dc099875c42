"""Runs that are stopped and started again leave the records of one that never was; a complete one is left
alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import SMALL, launch, records

from megatron_lpa.config import load_config
from megatron_lpa.errors import UserError
from megatron_lpa.run_folder import MANIFEST
from megatron_lpa.train.alike import sample_order
from megatron_lpa.train.complete import why_nothing_to_do
from megatron_lpa.train.data import open_data
from megatron_lpa.train.schedule import total_steps

STOPPED_IN_VALIDATION = """
import os, sys
if "megatron_lpa.pretrain" in sys.orig_argv and (step := os.environ.get("STOP_IN_VALIDATION_AT")):
    import signal
    import megatron_lpa.train.callbacks.evaluation as evaluation
    real = evaluation.evaluate_split
    def evaluate_split(run, *arguments):
        if run.progress.step == int(step):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, *arguments)
    evaluation.evaluate_split = evaluate_split
"""


def arguments(name: str, *more: str) -> list[str]:
    return [
        *SMALL, "--data.prefix", "data", "--data.split", "80,10,10", "--logging.name", name,
        "--logging.interval", "3",
        "--train.checkpoint_interval", "4", "--train.keep_checkpoints", "1", "--train.keep_best", "true",
        *more,
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a folder: what it holds, and when it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def told(run: Path) -> dict[tuple[str, int], float]:
    """Losses by kind and step; each is there once."""
    all_records = [record for kind in ("train", "valid", "test") for record in records(run, kind)]
    losses = {(record["kind"], record["step"]): record["loss"] for record in all_records}
    assert len(losses) == len(all_records)
    return losses


def nothing_to_do(run: Path, *change: str) -> str | None:
    config = load_config(arguments(run.name, *change))
    splits = open_data(config)
    steps = total_steps(config.train, config.model, splits.train.num_samples)
    return why_nothing_to_do(config, run, splits, sample_order(config, splits), steps)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    finished = launch(arguments("never-stopped"), 2, folder)
    assert finished.codes == [0, 0], finished.stderr
    return folder / "runs" / "never-stopped"


def test_a_stop_in_a_validation_changes_no_record(folder, undisturbed, tmp_path, monkeypatch):
    """It is made up by the next start, where its checkpoint learns of it; and means go over the stop.

    The stop after step 4 is amid the interval of steps 4 to 6, and the one after step 8 comes when training
    is over.
    """
    (tmp_path / "sitecustomize.py").write_text(STOPPED_IN_VALIDATION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = folder / "runs" / "stopped"
    for step in ("4", "8", "8"):  # the last one while it is made up
        monkeypatch.setenv("STOP_IN_VALIDATION_AT", step)
        assert launch(arguments("stopped"), 2, folder).codes == [143, 143]
        assert ("valid", int(step)) not in told(run) and not records(run, "test")
    monkeypatch.delenv("STOP_IN_VALIDATION_AT")
    finished = launch(arguments("stopped"), 2, folder)
    assert finished.codes == [0, 0], finished.stderr
    losses = told(undisturbed)
    assert list(losses) == [("train", 3), ("train", 6), ("train", 8), ("valid", 4), ("valid", 8), ("test", 8)]
    assert told(run) == losses
    for step in (4, 8):
        manifest = run / "checkpoints" / f"step_{step:08d}" / MANIFEST
        if manifest.exists():  # that of step 4 only if it is the best
            assert json.loads(manifest.read_text())["validation_loss"] == told(run)["valid", step]


def test_a_complete_run_is_left_as_it_is(folder, undisturbed):
    before = contents(undisturbed)
    again = launch(arguments("never-stopped", "--parallel.lowdim_layout", "column_row"), 2, folder)
    assert again.codes == [0, 0], again.stderr
    assert "is complete: all 8 steps are trained (step_00000008, valid loss " in again.stdout[0]
    assert "not used now: parallel.lowdim_layout was latent, is column_row" in again.stdout[0]
    refused = launch(arguments("never-stopped", "--optim.lr", "0.5"), 1, folder)
    assert refused.codes == [78] and "optim.lr was 0.002, is 0.5" in refused.errors[0], refused.errors
    assert "is complete: all 8 steps are trained" in refused.errors[0]
    assert contents(undisturbed) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--train.steps", "6"), "is complete: all 8 steps are trained .*, more than the 6 asked for"),
        (("--train.tokens", "768"), "is complete: all 8 steps are trained .*, more than the 6 asked for"),
        (("--optim.weight_decay", "1"),
        "complete: all 8 steps .* other settings than these: optim.weight_decay was 0.0, is 1.0"),
        (("--train.seed", "1"), "another order: order.seed was 27, is 1"),
        (("--model.norm_eps", "1"), "another model: model.norm_eps was 1e-06, is 1.0"),
        (("--data.split", "70,20,10"), "another order: order.samples_per_epoch was"),
    ],
)  # fmt: skip
def test_a_complete_run_is_no_run_of_other_settings(folder, undisturbed, monkeypatch, change, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message) as raised:
        nothing_to_do(undisturbed, *change)
    assert "another logging.name" in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [("--train.steps", "9"), ("--train.steps", "9", "--optim.lr", "0.5"), ("--train.epochs", "1")],
)
def test_a_complete_run_can_go_on(folder, undisturbed, monkeypatch, change):
    monkeypatch.chdir(folder)
    assert nothing_to_do(undisturbed, *change) is None


def test_what_is_not_recorded_is_done(folder, undisturbed, tmp_path, monkeypatch):
    """Somebody has removed the records, or the start before this one was killed in the test."""
    monkeypatch.chdir(folder)
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    assert "nothing is left to do" in nothing_to_do(run, "--train.tokens", "1024")  # the same length
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"test"' not in line))
    assert nothing_to_do(run) is None
    with pytest.raises(UserError, match=r"with other settings than these: optim\.lr was 0.002, is 0.5"):
        nothing_to_do(run, "--optim.lr", "0.5")
    (run / "metrics.jsonl").unlink()
    assert nothing_to_do(run) is None


def test_going_on_with_other_settings_is_recorded(folder):
    assert launch(arguments("longer", "--train.steps", "4"), 1, folder).codes == [0]
    finished = launch(arguments("longer", "--optim.weight_decay", "0.5"), 1, folder)
    assert finished.codes == [0], finished.stderr
    events = [record["message"] for record in records(folder / "runs" / "longer", "event")]
    assert all(f"note: {event}" in finished.stdout[0] for event in events if event.startswith("since "))
    assert "since step_00000004, optim.weight_decay was 0.0, is 0.5" in events
    assert "since step_00000004, train.steps was 4, is 8" in events
    jump = next(message for message in events if "the learning rate goes from" in message)
    assert "set optim.decay_steps=4 to keep it as it was" in jump
    tested = [record["step"] for record in records(folder / "runs" / "longer", "test")]
    assert tested == [4, 8]
