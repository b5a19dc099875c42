"""slurm/prepare_pile.sh as users submit it, on a real SLURM, against one undisturbed local run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import zstandard
from cluster import Cluster, Job

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = "slurm/prepare_pile.sh"
PYTHON = {"PYTHON": sys.executable}
OUTPUTS = ("_text_document.bin", "_text_document.idx")
LARGE = 2  # the shard that takes long enough to be killed in the middle


@dataclass
class Pile:
    """A small corpus and what has to come of it."""

    folder: Path
    tokenizer: Path
    expected: dict[str, bytes]

    def arguments(self, prefix: Path, *more: str) -> list[str]:
        return [
            "--input", str(self.folder), "--tokenizer", str(self.tokenizer), "--append-eod",
            "--output-prefix", str(prefix), "--workers", "1", "--commit-interval", "0.01", *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Pile:
    """Eight files in a folder whose name holds a blank; files 4 and 5 are shard 2 of 4."""
    folder = tmp_path_factory.mktemp("the pile")
    texts = [text for _, text in sorted(topics.items())]
    words, generator = " ".join(texts).split(), random.Random(1)
    large = [" ".join(generator.choices(words, k=20_000)) for _ in range(25)]
    for number in range(8):
        repeated = large * 8 if number == 2 * LARGE else []
        write_zst(folder / f"{number:02d}.jsonl.zst", texts[number::8] + repeated)
    tokenizer = tmp_path_factory.mktemp("tokenizer") / "bpe"
    sample = str(folder / "00.jsonl.zst")
    tool("train_tokenizer", "--input", sample, "--output", str(tokenizer), "--vocab-size", "600")
    pile = Pile(folder, tokenizer, {})
    prefix = tmp_path_factory.mktemp("expected") / "pile"
    tool("preprocess_data", *pile.arguments(prefix))
    pile.expected = outputs(prefix)
    return pile


def write_zst(path: Path, texts: list[str], *more: str) -> None:
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Python"}}) for text in texts]
    data = "".join(line + "\n" for line in [*lines, *more]).encode()
    path.write_bytes(zstandard.ZstdCompressor(1).compress(data))


def tool(name: str, *arguments: str, expected_code: int = 0) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == expected_code, done.stderr


def outputs(prefix: Path) -> dict[str, bytes]:
    return {ending: Path(f"{prefix}{ending}").read_bytes() for ending in OUTPUTS}


def submit(
    cluster: Cluster,
    folder: Path,
    array: str,
    arguments: list[str],
    environment: dict[str, str] | None = None,
) -> str:
    options = [f"--array={array}", f"--output={folder}/%x_%A_%a.log"]
    return cluster.submit(SCRIPT, arguments, options, PYTHON | (environment or {}), cwd=REPOSITORY)


def signal_after_progress(
    cluster: Cluster, task: str, prefix: Path, megabytes: int, number: signal.Signals
) -> None:
    """A signal to the large shard's task once it has written so much more than there is, of about 25 MB."""
    tokens = Path(f"{prefix}.shard-{LARGE:05d}-of-00004_text_document.bin.partial")
    # Longer than what an earlier start left, or waiting for a size would find it reached before any work.
    enough = (tokens.stat().st_size if tokens.exists() else 0) + megabytes * 10**6
    cluster.wait(task, ["RUNNING"])
    process = cluster.processes(task)[0]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if tokens.exists() and tokens.stat().st_size > enough:
            os.kill(process, number)
            return
        time.sleep(0.01)
    raise AssertionError(f"{tokens} did not grow to {enough} bytes:\n{cluster.output(task)}")


def stamps(pattern: str, folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again, or replaced."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob(pattern)}


def states(jobs: list[Job]) -> list[tuple[str, int]]:
    return [(job.state, job.exit_code) for job in jobs]


def test_killed_and_requeued_tasks_go_on_and_the_last_one_merges(
    cluster: Cluster, pile: Pile, tmp_path: Path
) -> None:
    folder = tmp_path / "out put"
    prefix = folder / "pile"
    others = [number for number in range(4) if number != LARGE]

    job = submit(cluster, tmp_path, "0-3", pile.arguments(prefix))
    signal_after_progress(cluster, f"{job}_{LARGE}", prefix, 3, signal.SIGKILL)
    ended = cluster.wait(job)
    assert [task.state for task in ended] == [
        "FAILED" if number == LARGE else "COMPLETED" for number in range(4)
    ], cluster.output(ended[LARGE])
    assert ended[LARGE].signal == signal.SIGKILL
    for number in others:
        assert "shards still to be done" in cluster.output(ended[number])
    assert not stamps("pile_text_document*", folder)
    finished = {name: stamp for name, stamp in stamps("*", folder).items() if not name.endswith(".partial")}
    assert len(finished) == 3 * len(others)

    # Now only SIGTERM makes it record progress. SLURM sends it with a SIGCONT; until then time stands still.
    arguments = pile.arguments(prefix, "--commit-interval", "1000")
    job = submit(cluster, tmp_path, str(LARGE), arguments, {"SHARDS": "4"})
    name = f"{job}_{LARGE}"
    signal_after_progress(cluster, name, prefix, 3, signal.SIGSTOP)
    cluster.requeue(name)
    (task,) = cluster.wait(name)
    output = cluster.output(task)
    assert (task.state, task.restarts) == ("COMPLETED", 1), output
    first, second = (
        int(line.split()[3]) for line in output.splitlines() if line.startswith("going on after ")
    )  # both starts wrote into one file
    assert 0 < first < second, output
    assert "shards still to be done" not in output
    assert outputs(prefix) == pile.expected

    finished |= stamps("pile*_text_document.*", folder)
    assert len(finished) == 3 * 5
    job = submit(cluster, tmp_path, "0-3", pile.arguments(prefix))
    ended = cluster.wait(job)
    assert states(ended) == [("COMPLETED", 0)] * 4, cluster.output(ended[0])
    assert stamps("*", folder) == finished  # nothing was written again, and nothing is left over


def test_one_task_merges_and_bad_records_show_as_exit_code_3(
    cluster: Cluster, pile: Pile, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = [text for _, text in sorted(topics.items())]
    for number in range(4):
        write_zst(corpus / f"{number}.jsonl.zst", texts[number::8], *(["{broken"] if number == 3 else []))
    corpus_pile = Pile(corpus, pile.tokenizer, {})
    prefix, local = tmp_path / "out" / "pile", tmp_path / "local" / "pile"

    job = submit(cluster, tmp_path, "0-3", corpus_pile.arguments(prefix, "--on-bad-line", "skip"))
    gaps = submit(cluster, tmp_path, "1,3", corpus_pile.arguments(tmp_path / "gaps"))
    tool("preprocess_data", *corpus_pile.arguments(local, "--on-bad-line", "skip"), expected_code=3)
    ended = cluster.wait(job)
    merged = [f"{prefix}_text_document: " in cluster.output(task) for task in ended]
    # The task with the bad record says so, and whoever merges says it of the whole.
    expected = [("FAILED", 3) if number == 3 or merged[number] else ("COMPLETED", 0) for number in range(4)]
    assert states(ended) == expected, cluster.output(ended[3])
    assert "1 bad records left out" in cluster.output(ended[3])
    assert any(merged)
    assert merged == ["not merged: " not in cluster.output(task) for task in ended]
    assert outputs(prefix) == outputs(local)

    refused = cluster.wait(gaps)
    assert states(refused) == [("FAILED", 1)] * 2
    assert "the array has gaps" in cluster.output(refused[0])
    assert "SHARDS=N" in cluster.output(refused[0])
    assert not list(tmp_path.glob("gaps*"))


def run_script(
    script: Path, arguments: list[str], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """The script as a program, without the variables of a SLURM that the tests may run in."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SHARDS"))}
    return subprocess.run(
        [str(script), *arguments],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_slurm_the_script_does_everything_from_any_folder(pile: Pile, tmp_path: Path) -> None:
    (tmp_path / "in put").symlink_to(pile.folder)
    arguments = Pile(Path("in put"), pile.tokenizer, {}).arguments(Path("out put/pile"))
    done = run_script(REPOSITORY / SCRIPT, arguments, tmp_path, PYTHON)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "out put" / "pile") == pile.expected


TASK = {
    "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "29",
    "SLURM_ARRAY_TASK_COUNT": "30", "SLURM_CPUS_PER_TASK": "16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "shard"),
    [
        ({}, "3/30"),
        ({"SHARDS": "40", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2"}, "3/40"),
    ],
)
def test_a_task_knows_its_shard_and_its_cores(changes: dict[str, str], shard: str, tmp_path: Path) -> None:
    done = run_script(REPOSITORY / SCRIPT, ["--input", "a b"], tmp_path, TASK | changes | {"PYTHON": "echo"})
    assert done.stdout == (
        f"{REPOSITORY}/slurm/../tools/preprocess_data.py --shard {shard} --merge --workers 16 --input a b\n"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "30"},
        {"SLURM_ARRAY_TASK_COUNT": "29"},
    ],
)
def test_an_array_with_gaps_needs_the_number_of_shards(changes: dict[str, str], tmp_path: Path) -> None:
    done = run_script(REPOSITORY / SCRIPT, [], tmp_path, TASK | changes | {"PYTHON": "echo"})
    assert (done.returncode, done.stdout) == (1, "")
    assert "submit with SHARDS=N in front" in done.stderr


def test_the_copy_that_slurm_runs_finds_the_repository_only_where_it_was_submitted(tmp_path: Path) -> None:
    copy = shutil.copy(REPOSITORY / SCRIPT, tmp_path / "slurm_script")
    lost = run_script(copy, [], tmp_path, {"SLURM_SUBMIT_DIR": str(tmp_path), "PYTHON": "echo"})
    assert (lost.returncode, lost.stdout) == (1, "")
    assert f"error: {tmp_path} is not the repository; run sbatch from there" in lost.stderr
    found = run_script(copy, [], tmp_path, {"SLURM_SUBMIT_DIR": str(REPOSITORY), "PYTHON": "echo"})
    assert found.stdout == f"{REPOSITORY}/tools/preprocess_data.py\n"
