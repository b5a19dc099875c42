"""The training scripts as users submit them, on a real SLURM of two nodes, against one undisturbed run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster, Job

from megatron_lpa.config import load_config
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 150
OPTIONS = ["--ntasks-per-node=1", "--cpus-per-task=1", "--mem=4G"]
ENVIRONMENT = {
    "PYTHON": sys.executable, "DEVICE": "cpu", "OMP_NUM_THREADS": "1", "MAX_RESTARTS_WITHOUT_PROGRESS": "1",
    "WANDB_API_KEY": "this-is-a-secret",
}  # fmt: skip
SMALL = ["--preset", "tiny/lpa", "--config", str(Path(__file__).with_name("small.yaml"))]


@dataclass
class Site:
    """A cluster, a dataset, and a folder of runs; both paths hold blanks."""

    cluster: Cluster
    folder: Path
    environment: dict[str, str]

    def submit(
        self, name: str, script: str = "lpa_3b", *more: str, option: str = "", **environment: str
    ) -> str:
        arguments = [
            *SMALL, "--data.prefix", str(self.folder / "my data" / "tokens"), "--train.steps", str(STEPS),
            "--logging.run_dir", str(self.folder / "my runs"), "--logging.name", name, *more,
        ]  # fmt: skip
        options = [*OPTIONS, f"--output={self.folder}/%x_%j.log", *([option] if option else [])]
        return self.cluster.submit(
            f"slurm/{script}.sh", arguments, options, self.environment | environment, cwd=REPOSITORY
        )

    def run(self, name: str) -> Path:
        return self.folder / "my runs" / name

    def ended(self, job: str) -> tuple[Job, str]:
        (ended,) = self.cluster.wait(job, timeout_s=300)
        return ended, self.cluster.output(ended)

    def wait_for_step(self, job: str, name: str, step: int) -> None:
        """Until the run has done this step, and still runs."""
        deadline = time.monotonic() + 200
        while not any(record["step"] >= step for record in records(self.run(name))):
            assert time.monotonic() < deadline, self.cluster.output(job)
            time.sleep(0.02)


def compiled_operators(folder: Path) -> Path:
    """A folder for what DeepSpeed compiles, which takes a minute, with what earlier tests compiled.

    Not that of other tests: one that killed a process there may have left a lock.
    """
    built, target = Path(os.environ["TORCH_EXTENSIONS_DIR"]), folder / "operators"
    built.mkdir(parents=True, exist_ok=True)
    shutil.copytree(built, target, ignore=shutil.ignore_patterns("lock"))
    return target


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    (folder / "my data").mkdir()
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "my data" / "tokens", np.uint16) as writer:
        for _ in range(400):
            steps = generator.integers(1, 4, size=100)
            writer.add_document((np.cumsum(steps) % 97).astype(np.uint16))
    return Site(cluster, folder, ENVIRONMENT | {"TORCH_EXTENSIONS_DIR": str(compiled_operators(folder))})


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> Path:
    """A complete run over both nodes."""
    ended, output = site.ended(site.submit("whole run"))
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 0), output
    assert "all 2 nodes can train" in output
    assert "2 processes = tensor parallel 1 x data parallel 2" in output
    assert f"step {STEPS}/{STEPS}" in output
    return site.run("whole run")


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == "train"]


def curve(run: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(run)]


def weights(run: Path) -> dict[str, bytes]:
    """The unsharded weights after the last step."""
    folder = run / "checkpoints" / f"step_{STEPS:08d}" / "weights"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def complete_steps(run: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in run.glob("checkpoints/step_*/manifest.json"))


def resumed_at(output: str) -> list[int]:
    """Steps of all "resuming from ... at step ..." lines."""
    lines = [line for line in output.splitlines() if line.startswith("resuming from ")]
    return [int(line.rsplit(" ", 1)[1].replace(",", "")) for line in lines]


def assert_same_run(run: Path, undisturbed: Path) -> None:
    assert curve(run) == curve(undisturbed)
    assert weights(undisturbed)
    assert weights(run) == weights(undisturbed)


def test_two_nodes_train_and_leave_a_snapshot_and_logs_by_rank(site: Site, undisturbed: Path) -> None:
    assert [step for step, _, _ in curve(undisturbed)] == list(range(1, STEPS + 1))
    (logs,) = undisturbed.glob("logs/*.0")
    assert sorted(path.name for path in logs.iterdir()) == ["rank_0000.log", "rank_0001.log"]
    assert f"step {STEPS}/{STEPS}" in (logs / "rank_0000.log").read_text()
    assert "step 1/" not in (logs / "rank_0001.log").read_text()

    snapshot = undisturbed / "snapshot"
    config = load_config(["--config", str(snapshot / "config.yaml")])
    assert config == load_config(["--config", str(undisturbed / "config.yaml")])
    assert "torch==" in (snapshot / "packages.txt").read_text()
    recorded = (snapshot / "job_script.sh").read_text().splitlines()
    script = (REPOSITORY / "slurm" / "lpa_3b.sh").read_text().splitlines()
    ours = [
        line for line in script if line.startswith(("#SBATCH", "train_on_slurm")) and "--job-name" not in line
    ]
    assert [line for line in recorded[1:] if "--job-name" not in line] == ours
    assert "NumNodes=2" in (snapshot / "job.txt").read_text()
    assert "'whole run'" in (snapshot / "command.txt").read_text()
    with tarfile.open(snapshot / "code.tar.gz") as archive:
        assert {"megatron_lpa/pretrain.py", "slurm/common.sh", "constraints.txt"} <= set(archive.getnames())
    for path in undisturbed.rglob("*"):
        assert not path.is_file() or ENVIRONMENT["WANDB_API_KEY"].encode() not in path.read_bytes(), path


def test_a_preempted_job_saves_requeues_and_ends_with_the_same_weights(site: Site, undisturbed: Path) -> None:
    job = site.submit("preempted run", "transformer_3b")
    site.wait_for_step(job, "preempted run", 25)
    site.cluster.signal_script(job, "USR1")
    ended, output = site.ended(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), output
    (step,) = resumed_at(output)
    assert 25 <= step < STEPS
    assert step % 20, "it went on from a checkpoint of the interval, not from its own"
    assert "SIGUSR1: asking the training processes for a checkpoint" in output
    run = site.run("preempted run")
    assert_same_run(run, undisturbed)
    starts = [json.loads(line) for line in (run / "logs" / "starts.jsonl").read_text().splitlines()]
    assert [(start["job"], start["restarts"]) for start in starts] == [(job, 0), (job, 1)]


def test_sigterm_saves_and_ends_the_job(site: Site) -> None:
    job = site.submit("stopped run", "lpa_3b", "--train.checkpoint_interval", "0")
    site.wait_for_step(job, "stopped run", 3)
    site.cluster.signal_script(job, "TERM")
    ended, output = site.ended(job)
    # Neither FAILED, as nothing did, nor COMPLETED, as jobs with --dependency=afterok would start.
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), output
    (step,) = complete_steps(site.run("stopped run"))
    assert 3 <= step < STEPS
    said = output.splitlines()
    assert f"stopped at the checkpoint of step {step}; submit the same line again to continue" in said[-1]

    job = site.submit("stopped run", "lpa_3b", "--train.checkpoint_interval", "0")
    site.wait_for_step(job, "stopped run", step + 3)
    site.cluster.cancel(job)
    ended, output = site.ended(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), output
    assert resumed_at(output) == [step], output
    assert complete_steps(site.run("stopped run"))[-1] > step, output


def test_the_loss_of_a_node_costs_at_most_a_checkpoint_interval(site: Site, undisturbed: Path) -> None:
    job = site.submit("robust run")
    site.wait_for_step(job, "robust run", 45)
    site.cluster.cut_power(site.cluster.nodes[0])
    time.sleep(1)
    site.cluster.power_on(site.cluster.nodes[0], timeout_s=60)
    ended, output = site.ended(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), output
    (step,) = resumed_at(output)
    assert 40 <= step < STEPS
    assert step % 20 == 0
    assert_same_run(site.run("robust run"), undisturbed)


def test_a_job_that_always_fails_is_not_started_for_ever(site: Site) -> None:
    run = site.run("locked run")
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = site.submit("locked run", "lpa_3b", "--train.lock_wait_s", "1")
        ended, output = site.ended(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 4, 1), output
    for start in range(2):
        log = run / "logs" / f"{job}.{start}" / "rank_0000.log"
        assert "error: " in log.read_text()
        assert "another run is writing here" in log.read_text()
    assert "error: 2 starts of this job brought no checkpoint after step 0" in output


def test_an_error_that_stays_is_not_tried_again(site: Site, undisturbed: Path) -> None:
    """The same run with another model, which no other start would change."""
    job = site.submit("whole run", "lpa_3b", "--model.num_layers", "1")
    ended, output = site.ended(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 78, 0), output
    assert "was written with another model" in output
    assert "was written with another model" in output.splitlines()[-1]  # below what srun says of each process
    assert "another start would end in the same way" in output


def test_little_of_the_environment_and_a_port_that_is_taken(site: Site) -> None:
    """sbatch --export=... counts for srun as well, and what listens at a port may do so for days."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        given = {
            **site.environment,
            "MASTER_PORT": str(port),
            "SLURM_LABELIO": "1",
            "MAX_RESTARTS_WITHOUT_PROGRESS": "0",
        }
        few = ",".join(f"{name}={value}" for name, value in given.items())
        job = site.submit("little run", "lpa_3b", "--train.steps", "3", option=f"--export={few}")
        ended, output = site.ended(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 0), output
    assert f"note: port {port} cannot be used on" in output
    assert [record["step"] for record in records(site.run("little run"))] == [1, 2, 3]


def test_a_requeued_job_whose_nodes_are_not_ready_starts_again(site: Site) -> None:
    """The dataset is gone when the job comes back, as with a mount that is slow."""
    data = site.folder / "slow data"
    shutil.copytree(site.folder / "my data", data)
    prefix = ("--data.prefix", str(data / "tokens"))
    job = site.submit("slow run", "lpa_3b", *prefix, HEALTH_PAUSE_S="0")
    site.wait_for_step(job, "slow run", 5)
    site.cluster.signal_script(job, "USR1")
    deadline = time.monotonic() + 100
    while not list((site.run("slow run") / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    data.rename(site.folder / "away")  # SLURM takes seconds to start the job again
    ended, output = site.ended(job)
    assert "the nodes are not ready (attempt 3 of 3)" in output and output.count("requeued") >= 2, output
    assert (ended.state, ended.exit_code) == ("FAILED", 4), output


def test_nodes_that_cannot_train_are_named_before_training_starts(site: Site) -> None:
    prefix = str(site.folder / "missing data")
    apptainer = site.folder / "bin" / "apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text(f'#!/bin/bash\necho "$@" >>"{site.folder}/containers"\nshift 3\nexec "$@"\n')
    apptainer.chmod(0o755)
    path = f"{apptainer.parent}:{os.environ['PATH']}"
    more = {"DEVICE": "gpu", "CONTAINER": "my image.sif", "PATH": path}
    job = site.submit("ill run", "lpa_3b", "--data.prefix", prefix, **more)
    wrong = site.submit("wrong run", "lpa_3b", "--train.global_batch_size", "7")
    ended, output = site.ended(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 3, 0), output
    for node in site.cluster.nodes:
        assert f"error: {node}: 0 of 1 GPUs are visible to torch" in output
        assert f"error: {node}: {prefix}.idx: no such file" in output
    assert not records(site.run("ill run"))
    assert "training was not started" in output
    started = (site.folder / "containers").read_text().splitlines()
    assert all(line.startswith(f"exec --nv my image.sif {sys.executable} ") for line in started)
    tools = [line.partition("/tools/")[2].partition(" --")[0] for line in sorted(started)]
    assert [tool for tool in tools if tool] == [
        "health_check.py judge 127.0.0.1 127.0.0.2", "health_check.py node", "health_check.py node",
        "snapshot_run.py",
    ]  # fmt: skip
    assert [line.partition(" -m ")[2].split()[0] for line in started if "/tools/" not in line] == [
        "megatron_lpa.run_folder"
    ]

    ended, output = site.ended(wrong)
    assert (ended.state, ended.exit_code) == ("FAILED", 2), output
    assert "train.global_batch_size" in output
