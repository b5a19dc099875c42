"""Whole runs through the entry point: what they leave, layouts, signals, resuming."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from launching import SMALL, Launch, launch, records

from fault_injection.launches import free_port
from megatron_lpa.checkpoint.manifest import complete_checkpoints, read_manifest
from megatron_lpa.checkpoint.progress import Progress
from megatron_lpa.config import load_config
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter


def arguments(name: str, *more: str) -> list[str]:
    return [*SMALL, "--data.prefix", "data", "--data.split", "80,10,10", "--logging.name", name, *more]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """A complete run of two data-parallel processes under ZeRO-3."""
    finished = launch(arguments("undisturbed"), 2, folder)
    assert finished.codes == [0, 0], finished.stderr
    assert finished.stdout[1] == "" and "step 8/8" in finished.stdout[0]
    return folder / "runs" / "undisturbed"


def test_a_run_leaves_its_config_metrics_and_a_checkpoint(undisturbed):
    config = load_config(["--config", str(undisturbed / "config.yaml")])
    assert config.train.steps == 8 and config.model.hidden_size == 32
    train = records(undisturbed, "train")
    assert [record["step"] for record in train] == list(range(1, 9))
    assert [record["tokens"] for record in train] == [step * 8 * 16 for step in range(1, 9)]
    assert train[-1]["loss"] < train[0]["loss"]
    for key in ("lr", "grad_norm", "tokens_per_second", "step_ms", "data_wait_ms", "memory_peak_bytes"):
        assert all(math.isfinite(record[key]) and record[key] >= 0 for record in train), key
    assert [record["step"] for record in records(undisturbed, "valid")] == [4, 8]
    (test,) = records(undisturbed, "test")
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]))
    (checkpoint,) = complete_checkpoints(undisturbed / "checkpoints")
    assert read_manifest(checkpoint)["progress"] == Progress(8, 64, 1024)


@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (1, ["--train.deepspeed_config", "zero0"]),
        (2, ["--parallel.tensor_parallel_size", "2", "--parallel.lowdim_layout", "column_row"]),
        (2, ["--train.deepspeed_config", "zero1", "--train.micro_batch_size", "4"]),
        (4, ["--parallel.tensor_parallel_size", "2", "--train.deepspeed_config", "zero3_offload"]),
    ],
)
def test_every_layout_gives_the_same_curve(folder, undisturbed, processes, more):
    name = "-".join(more).replace("--", "").replace("/", "")
    # The vocabulary of 97 must be padded for TP 2; padding changes nothing either.
    finished = launch(arguments(name, *more, "--model.pad_vocab_to_multiple_of", "2"), processes, folder)
    assert finished.codes == [0] * processes, finished.stderr
    for kind in ("train", "valid", "test"):
        expected = [record["loss"] for record in records(undisturbed, kind)]
        assert [r["loss"] for r in records(folder / "runs" / name, kind)] == pytest.approx(expected, rel=1e-5)
    expected = [record["grad_norm"] for record in records(undisturbed, "train")]
    actual = [record["grad_norm"] for record in records(folder / "runs" / name, "train")]
    assert actual == pytest.approx(expected, rel=1e-4)


def wait_for_step(run: Path, step: int, running: Launch | subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(r["step"] >= step for r in records(run, "train")):
            return
        time.sleep(0.05)
    raise TimeoutError(f"{run} did not reach step {step}")


@pytest.mark.parametrize(("signum", "victim"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_resuming_is_exact(
    folder, tmp_path_factory, signum, victim
):
    steps = ["--train.steps", "400", "--train.eval_interval", "100"]
    name = f"stopped-{signum.name}"
    run = folder / "runs" / name
    running = Launch(arguments(name, *steps), 2, folder)
    wait_for_step(run, 3, running)
    running.processes[victim].send_signal(signum)
    running.processes[victim].send_signal(signum)  # a second one does no harm
    finished = running.wait()
    assert finished.codes == [128 + signum] * 2, finished.stderr
    (checkpoint,) = complete_checkpoints(run / "checkpoints")
    stopped_at = read_manifest(checkpoint)["progress"].step
    assert 3 <= stopped_at < 400
    said = f"stopped by {signum.name} after step {stopped_at}, which is saved; the same command continues"
    assert [said in stdout for stdout in finished.stdout] == [True, False]
    assert records(run, "test") == []

    shorter = [
        "--train.steps",
        str(stopped_at + 4),
        "--optim.decay_steps",
        "400",
        "--train.eval_interval",
        "0",
    ]
    resumed = launch(arguments(name, *shorter), 2, folder)
    assert resumed.codes == [0, 0], resumed.stderr
    assert f"resuming from {Path('runs') / name}" in resumed.stdout[0]
    whole = f"whole-{signum.name}"
    assert launch(arguments(whole, *shorter), 2, folder).codes == [0, 0]
    expected = [(r["step"], r["loss"], r["grad_norm"]) for r in records(folder / "runs" / whole, "train")]
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in records(run, "train")] == expected
    assert records(run, "test")[0]["loss"] == records(folder / "runs" / whole, "test")[0]["loss"]


def test_a_blend_goes_on_exactly_with_another_micro_batch_size(folder):
    with IndexedDatasetWriter(folder / "more.v2", np.uint16) as writer:
        for number in range(60):
            writer.add_document((np.arange(50) * (number % 5 + 1) % 97).astype(np.uint16))
    blend = [
        "--data.prefix",
        "null",
        "--data.blend",
        '{"data": 0.7, "more.v2": 0.3}',
        "--optim.decay_steps",
        "8",
    ]
    whole = launch(arguments("blend-whole", *blend), 2, folder)
    assert whole.codes == [0, 0], whole.stderr
    assert "note: the run reads" in whole.stdout[0] and "more.v2 (30 % of the samples)" in whole.stdout[0]
    assert launch(arguments("blend", *blend, "--train.steps", "4"), 2, folder).codes == [0, 0]
    resumed = launch(arguments("blend", *blend, "--train.micro_batch_size", "4"), 2, folder)
    assert resumed.codes == [0, 0], resumed.stderr
    for kind in ("train", "valid"):
        expected = {r["step"]: r["loss"] for r in records(folder / "runs" / "blend-whole", kind)}
        actual = {r["step"]: r["loss"] for r in records(folder / "runs" / "blend", kind)}
        assert actual == pytest.approx(expected, rel=1e-5)
    # Another weight is another order of samples.
    heavier = [*blend[:3], '{"data": 0.8, "more.v2": 0.2}', *blend[4:], "--train.steps", "9"]
    refused = launch(arguments("blend", *heavier), 2, folder)
    assert refused.codes == [78, 78]
    assert len(refused.errors) == 1 and "weight was 7/10, is 4/5" in refused.errors[0]


def test_a_complete_run_started_again_only_tests_again(folder, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_text()
    finished = launch(arguments("undisturbed"), 2, folder)
    assert finished.codes == [0, 0], finished.stderr
    assert (undisturbed / "metrics.jsonl").read_text().startswith(before[: before.index('{"kind": "test"')])
    assert len(records(undisturbed, "train")) == 8
    assert len(complete_checkpoints(undisturbed / "checkpoints")) == 1


def test_resume_never_and_must(folder, undisturbed):
    refused = launch(arguments("undisturbed", "--train.resume", "never"), 2, folder)
    assert refused.codes == [78, 78]
    assert len(refused.errors) == 1 and "train.resume=never" in refused.errors[0]
    missing = launch(arguments("nothing-here", "--train.resume", "must"), 2, folder)
    assert missing.codes == [78, 78]
    assert len(missing.errors) == 1 and "nothing-here" in missing.errors[0]


def deepspeed_command(folder: Path, name: str, **output: Any) -> subprocess.Popen:
    """A long run under DeepSpeed's launcher; ``output`` is for ``Popen``."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2",
        "--master_port", str(free_port()), "--module", "megatron_lpa.pretrain",
    ]  # fmt: skip
    return subprocess.Popen(
        [*command, *arguments(name, "--train.steps", "100000")],
        cwd=folder, env=os.environ | {"DS_ACCELERATOR": "cpu"}, **output,
    )  # fmt: skip


def test_the_deepspeed_launcher_runs_and_stops_with_it(folder):
    """SIGTERM to the ``deepspeed`` command, which does not pass it on, still stops with a checkpoint."""
    run = folder / "runs" / "launcher"
    process = deepspeed_command(
        folder, "launcher", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_step(run, 3, process)
    finally:
        process.terminate()
    deadline = time.monotonic() + 60
    while not complete_checkpoints(run / "checkpoints"):
        assert time.monotonic() < deadline, "training went on without its launcher"
        time.sleep(0.2)
    output, _ = process.communicate(timeout=60)  # ends when the last process of the run closes its output
    assert "Traceback" not in output


def test_the_deepspeed_launchers_exit_code_says_nothing_but_the_run_folder_does(folder, undisturbed):
    """Its per-node launcher killed, the command ends with 0; the processes stop with a checkpoint all the
    same."""
    run = folder / "runs" / "killed-launcher"
    process = deepspeed_command(
        folder, "killed-launcher", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_step(run, 3, process)
        (per_node,) = psutil.Process(process.pid).children()
        per_node.kill()
        assert (
            process.wait(timeout=60) == 0
        )  # DeepSpeed 0.19.8; should it become another code, say so in docs/running.md
    finally:
        if process.poll() is None:
            for started in [*psutil.Process(process.pid).children(recursive=True), process]:
                started.kill()
    deadline = time.monotonic() + 60
    while not complete_checkpoints(run / "checkpoints"):
        assert time.monotonic() < deadline, "training went on without its launcher"
        time.sleep(0.2)

    def status(name):
        tool = Path(__file__).parents[2] / "tools" / "run_status.py"
        return subprocess.run(
            [sys.executable, tool, f"runs/{name}"], cwd=folder, capture_output=True, text=True
        )

    stopped = status("killed-launcher")
    assert stopped.returncode == 1 and "of 100,000 steps" in stopped.stdout, stopped.stderr
    complete = status(undisturbed.name)
    assert complete.returncode == 0 and complete.stdout.startswith("complete: 8 of 8 steps"), complete.stderr


def test_a_launcher_that_is_killed_while_training_starts_leaves_nothing_that_trains(folder):
    process = deepspeed_command(folder, "orphaned", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    trainers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while len(trainers) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            below = psutil.Process(process.pid).children(recursive=True)
            # The watchdog's thread is there: the first lines have run, and training is seconds away.
            trainers = [p for p in below if p.num_threads() > 1 and _is_training(p.cmdline())]
        (per_node,) = psutil.Process(process.pid).children()
        assert len(trainers) == 2 and not (folder / "runs" / "orphaned").exists()
        per_node.kill()
        _, alive = psutil.wait_procs(trainers, timeout=120)
        assert not alive, "training goes on without its launcher"
    finally:
        for trainer in trainers:
            if trainer.is_running():
                trainer.kill()
        process.kill()
        process.wait()


def _is_training(command: list[str]) -> bool:
    return "megatron_lpa.pretrain" in command and not any("deepspeed" in word for word in command[:4])


def test_wandb_offline_and_tensorboard(folder):
    more = ["--logging.wandb", "offline", "--logging.tensorboard", "true", "--train.steps", "2"]
    finished = launch(arguments("views", *more), 1, folder)
    assert finished.codes == [0], finished.stderr
    run = folder / "runs" / "views"
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in records(run, "train")]
