"""When a run is stopped or killed decides nothing: it goes back as the undisturbed run does, to the same
weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from integration.launching import SMALL, launch, records
from safetensors.numpy import load_file

from megatron_lpa.run_folder import MANIFEST

SIGTERM, KILLED = 143, 9


def arguments(name: str, *more: str) -> list[str]:
    return [
        *SMALL, "--data.prefix", "data", "--logging.name", name, "--train.eval_interval", "0",
        "--train.deepspeed_config", "zero2", "--train.checkpoint_interval", "4", "--train.keep_checkpoints",
        "1", *more,
    ]  # fmt: skip


def manifest(run: Path, step: int) -> dict:
    return json.loads((run / f"checkpoints/step_{step:08d}" / MANIFEST).read_text())


def went_back(run: Path) -> list[str]:
    return [event["message"] for event in records(run, "event") if event["message"].startswith("went back")]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def assert_same_end(run: Path, undisturbed: Path, step: int) -> None:
    for key in ("progress", "decisions"):
        assert manifest(run, step)[key] == manifest(undisturbed, step)[key]
    assert went_back(run) == went_back(undisturbed)
    weights = f"checkpoints/step_{step:08d}/weights/model.safetensors"
    expected, found = load_file(undisturbed / weights), load_file(run / weights)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []
    curve = {r["step"]: (r["loss"], r["grad_norm"]) for r in records(undisturbed, "train")}
    assert {r["step"]: (r["loss"], r["grad_norm"]) for r in records(run, "train")} == curve


@pytest.mark.parametrize("processes", [1, 2])
def test_skipped_steps_count_across_a_stop_and_a_kill(folder: Path, processes: int) -> None:
    options = ("--train.max_skipped_steps", "3")
    bad = dict.fromkeys((5, 6, 7), "nan")
    whole, parts = f"skips-{processes}", f"skips-in-parts-{processes}"
    done = launch(arguments(whole, *options), processes, folder, bad)
    assert done.codes == [0] * processes, done.stderr
    undisturbed, run = folder / "runs" / whole, folder / "runs" / parts
    assert len(went_back(undisturbed)) == 1
    assert (
        "step_00000004 because of step 8: the gradient was not finite in 3 steps" in went_back(undisturbed)[0]
    )

    stopped = launch(arguments(parts, *options), processes, folder, bad | {7: "stop"})
    assert stopped.codes == [SIGTERM] * processes, stopped.stderr
    assert manifest(run, 7)["decisions"] == {"skipped_in_a_row": 2, "losses": [], "rollbacks": 0}
    assert checkpoints(run) == ["step_00000004", "step_00000007"]  # where it may have to go back to stays
    killed = launch(arguments(parts, *options), processes, folder, bad | {8: "die"})
    assert killed.codes == [KILLED] * processes and "went back to step_00000004" in killed.stderr[0]
    assert checkpoints(run) == ["step_00000004"]  # or the next start would go on from the other one
    assert "step_00000007 is removed" in killed.stderr[0]
    stopped = launch(arguments(parts, *options), processes, folder, {9: "stop"})
    assert stopped.codes == [SIGTERM] * processes, stopped.stderr
    assert launch(arguments(parts, *options), processes, folder).codes == [0] * processes
    assert_same_end(run, undisturbed, 8)


@pytest.mark.parametrize(("processes", "first_bad"), [(1, 11), (2, 13)])
def test_losses_are_compared_across_a_stop_and_a_kill_and_after_going_back(
    folder: Path, processes: int, first_bad: int
) -> None:
    """Of two bad batches in a row each is recognised at once.

    Before the batch 11 the checkpoint gone back to, of step 8, has too few losses of its own to compare the
    next with.
    """
    options = ("--train.loss_spike", "1.5", "--train.steps", "16")
    bad = {first_bad: "spike", first_bad + 1: "spike"}
    whole, parts = f"spikes-{processes}", f"spikes-in-parts-{processes}"
    done = launch(arguments(whole, *options), processes, folder, bad)
    assert done.codes == [0] * processes, done.stderr
    undisturbed, run = folder / "runs" / whole, folder / "runs" / parts
    back_to = first_bad // 4 * 4
    assert [message.split(":")[0] for message in went_back(undisturbed)] == [
        f"went back to step_{back_to:08d} because of step {step}" for step in (first_bad + 1, back_to + 1)
    ]
    assert manifest(undisturbed, 16)["progress"]["skipped_samples"] == 8 * (first_bad + 2 - back_to)

    # Stopped right before the first, killed before the second.
    stopped = launch(arguments(parts, *options), processes, folder, {first_bad: "stop"})
    assert stopped.codes == [SIGTERM] * processes, stopped.stderr
    losses = [record["loss"] for record in records(run, "train")]
    assert manifest(run, first_bad)["decisions"]["losses"] == losses and len(losses) == first_bad
    killed = launch(arguments(parts, *options), processes, folder, bad | {first_bad + 1: "die"})
    assert killed.codes == [KILLED] * processes and "went back" in killed.stderr[0]
    assert launch(arguments(parts, *options), processes, folder, bad).codes == [0] * processes
    assert_same_end(run, undisturbed, 16)


def test_a_checkpoint_amid_bad_steps_does_not_use_up_going_back(folder: Path) -> None:
    """Each time it takes as many bad steps as the first time, ends behind them, and is counted."""
    options = ("--train.max_skipped_steps", "3", "--train.max_rollbacks", "2")
    done = launch(arguments("amid", *options), 1, folder, dict.fromkeys(range(3, 40), "nan"))
    assert done.codes == [78]
    assert "after going back 2 times (train.max_rollbacks)" in done.errors[0]
    run = folder / "runs/amid"
    assert manifest(run, 4)["decisions"]["skipped_in_a_row"] == 1
    assert [message.rpartition("behind ")[2] for message in went_back(run)] == [
        "sample 47 of the order",
        "sample 71 of the order",
    ]


def test_an_interval_that_was_changed_costs_no_steps_and_no_checkpoint(folder: Path) -> None:
    """Steps 1 to 6 saved at an interval of 1; then one of 5, a stop at step 7, and bad batches right after
    it."""
    options = ("--train.max_skipped_steps", "1", "--train.keep_checkpoints", "0", "--train.keep_every", "1")
    first = ("--train.steps", "6", "--optim.decay_steps", "8", "--train.checkpoint_interval", "1")
    assert launch(arguments("changed", *options, *first), 2, folder).codes == [0, 0]
    run = folder / "runs/changed"
    second = (*options, "--optim.decay_steps", "8", "--train.checkpoint_interval", "5")
    stopped = launch(arguments("changed", *second), 2, folder, {7: "stop"})
    assert stopped.codes == [SIGTERM] * 2, stopped.stderr
    assert [manifest(run, step)["at_interval"] for step in (5, 6, 7)] == [True, True, False]
    before = (run / "checkpoints/step_00000007" / MANIFEST).read_bytes()
    done = launch(arguments("changed", *second), 2, folder, {7: "nan"})
    assert done.codes == [0, 0], done.stderr
    assert went_back(run) and "step_00000006 because of step 8" in went_back(run)[0]
    assert "step_00000007 is now passed_step_00000007" in done.stderr[0]
    assert checkpoints(run) == [f"step_{step:08d}" for step in (1, 2, 3, 4, 5, 6, 8)]
    assert (run / "checkpoints/passed_step_00000007" / MANIFEST).read_bytes() == before
    assert manifest(run, 8)["progress"]["skipped_samples"] == 16
