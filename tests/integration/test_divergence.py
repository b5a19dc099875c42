"""Steps that are skipped, and runs that go back to a checkpoint, through the entry point with two
processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from integration.launching import SMALL, launch, records
from safetensors.numpy import load_file

from megatron_lpa.checkpoint.manifest import sealed
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter
from megatron_lpa.run_folder import MANIFEST


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("divergence")
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(path / "data", np.uint16) as writer:
        for _ in range(200):
            writer.add_document(random.integers(0, 97, 40).astype(np.uint16))
    return path


def arguments(name: str, *more: str) -> list[str]:
    return [
        *SMALL, "--data.prefix", "data", "--logging.name", name, "--train.eval_interval", "0",
        "--train.deepspeed_config", "zero2", "--train.checkpoint_interval", "4", "--train.keep_checkpoints",
        "0", *more,
    ]  # fmt: skip


def final_weights(run: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run / f"checkpoints/step_{step:08d}/weights/model.safetensors")


def progress(run: Path, step: int) -> dict[str, int]:
    return json.loads((run / f"checkpoints/step_{step:08d}" / MANIFEST).read_text())["progress"]


def test_a_skipped_step_is_told_and_counted(folder: Path) -> None:
    done = launch(arguments("skipped"), 2, folder, {2: "nan"})
    assert done.codes == [0, 0], done.stderr
    run = folder / "runs/skipped"
    said = (
        "the gradient is not finite: the step changed nothing, and samples 16 to 23 of the order are passed "
        "over"
    )
    assert f"warning: step 3: {said}" in done.stderr[0] and said not in done.stderr[1]
    assert any(said in event["message"] for event in records(run, "event"))
    train = records(run, "train")
    assert [record["skipped_steps"] for record in train] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [record["step"] for record in train if record["loss"] is None] == [3]
    assert train[2]["grad_norm"] is None
    assert (
        "Infinity" not in (run / "metrics.jsonl").read_text()
        and "NaN" not in (run / "metrics.jsonl").read_text()
    )


def test_too_many_skipped_steps_go_back_and_behind_the_bad_data(folder: Path) -> None:
    options = ("--train.max_skipped_steps", "2", "--logging.interval", "1")
    done = launch(arguments("back", *options), 2, folder, {5: "nan", 6: "nan"})
    assert done.codes == [0, 0], done.stderr
    run = folder / "runs/back"
    assert (
        "went back to step_00000004 because of step 7: the gradient was not finite in 2 steps in a row"
        in done.stderr[0]
    )
    assert [record["step"] for record in records(run, "train")] == list(range(1, 9))
    assert progress(run, 8) == {
        "step": 8, "consumed_samples": 64, "consumed_tokens": 1024, "skipped_samples": 24,
    }  # fmt: skip
    assert any("went back" in event["message"] for event in records(run, "event"))

    # Killed on the way back, before any checkpoint tells of it.
    killed = launch(arguments("killed", *options), 2, folder, {5: "nan", 6: "nan", 7: "die"})
    assert killed.codes == [9, 9] and "went back to step_00000004" in killed.stderr[0]
    again = launch(arguments("killed", *options), 2, folder, {5: "nan", 6: "nan"})
    assert again.codes == [0, 0] and "went back" not in again.stderr[0], again.stderr
    assert progress(folder / "runs/killed", 8) == progress(run, 8)
    expected, found = final_weights(run, 8), final_weights(folder / "runs/killed", 8)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    # Going back again is counted on, also by a start that has not gone back itself.
    once = launch(arguments("often", *options, "--train.max_rollbacks", "1"), 2, folder, {5: "nan", 6: "nan", 7: "die"})  # fmt: skip  # noqa: E501
    assert once.codes == [9, 9]
    more = launch(arguments("often", *options, "--train.max_rollbacks", "1"), 2, folder, {7: "nan", 8: "nan"})  # fmt: skip  # noqa: E501
    assert more.codes == [78, 78] and "after going back 1 times" in more.errors[0]

    # The same by hand: four steps, then on from there with the three global batches 4, 5 and 6 passed over.
    stopped = arguments("by-hand", "--train.steps", "4", "--optim.decay_steps", "8")
    assert launch(stopped, 2, folder).codes == [0, 0]
    path = folder / "runs/by-hand/checkpoints/step_00000004" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["progress"]["skipped_samples"] = 24
    del manifest["checksum"], manifest["decisions"]  # as earlier versions wrote it: without the latter
    path.write_text(json.dumps(sealed(manifest)))
    assert launch(arguments("by-hand", "--optim.decay_steps", "8"), 2, folder).codes == [0, 0]
    expected = final_weights(folder / "runs/by-hand", 8)
    for name, value in final_weights(run, 8).items():
        assert np.array_equal(value, expected[name]), name


def test_a_loss_spike_goes_back(folder: Path) -> None:
    options = ("--train.loss_spike", "1.5", "--train.steps", "20", "--logging.interval", "5")
    done = launch(arguments("spike", *options), 2, folder, {13: "spike"})
    assert done.codes == [0, 0], done.stderr
    assert "went back to step_00000012 because of step 14: the loss is" in done.stderr[0]
    assert "more than train.loss_spike=1.5 above" in done.stderr[0]
    assert progress(folder / "runs/spike", 20)["skipped_samples"] == 16
    assert [record["step"] for record in records(folder / "runs/spike", "train")] == [5, 10, 15, 20]


def test_a_run_that_cannot_be_saved_this_way_ends_with_advice(folder: Path) -> None:
    faults = dict.fromkeys(range(5, 40), "nan")
    options = ("--train.max_skipped_steps", "1", "--train.max_rollbacks", "2")
    done = launch(arguments("lost", *options), 2, folder, faults)
    assert done.codes == [78, 78]
    (error,) = done.errors
    assert "after going back 2 times (train.max_rollbacks): training has diverged; lower optim.lr" in error
    assert (folder / "runs/lost/checkpoints/step_00000004" / MANIFEST).is_file()
    first = launch(arguments("never", *options), 2, folder, {0: "nan"})
    assert first.codes == [78, 78]
    assert (
        "step 1: the gradient was not finite in 1 steps in a row, and there is no checkpoint to go back to"
        in first.errors[0]
    )


def test_a_hang_names_the_rank_and_the_stage_and_the_run_continues_afterwards(folder: Path) -> None:
    options = ("--train.step_timeout_s", "4")
    done = launch(arguments("hang", *options), 2, folder, {6: "hang"})
    assert set(done.codes) == {75}, done.stderr
    assert any("error: rank 1 is reading data after 6 steps, for " in text for text in done.stderr), (
        done.stderr
    )
    assert any(
        "error: rank 1 is reading data after 6 steps, and 1 waits for it: look at it first" in t
        for t in done.stderr
    )
    assert not any("error: rank 0 is reading data" in text for text in done.stderr), "it waits"
    stacks = (folder / "runs/hang/logs/hang/rank_00001.txt").read_text()
    assert "read_batches" in stacks
    assert launch(arguments("hang", *options), 2, folder).codes == [0, 0]
    undisturbed = launch(arguments("no-hang"), 2, folder)
    assert undisturbed.codes == [0, 0]
    expected = final_weights(folder / "runs/no-hang", 8)
    for name, value in final_weights(folder / "runs/hang", 8).items():
        assert np.array_equal(value, expected[name]), name
    train = records(folder / "runs/no-hang", "train")
    assert all(record["slowest_rank"] in (0, 1) and record["slowest_rank_late_ms"] >= 0 for record in train)
