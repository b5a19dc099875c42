"""``tools/merge_datasets.py`` as a user meets it, killed ones included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from support.token_datasets import random_documents, write_dataset

from megatron_lpa.data.storage.dataset_manifest import read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.preparation.bpe import train_tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "merge_datasets.py"
# Stops where a kill hurts most, after half of the copying or just before the index gets its name.
STOPPING = """
import runpy, sys, time
from megatron_lpa.data.storage import partial_file
name = sys.argv[1]
def stop(original):
    calls = []
    def method(file, *arguments):
        calls.append(file)
        if (name == "write" and len(calls) == 3) or (name == "publish" and file.path.suffix == ".idx"):
            print("stopped", flush=True)
            time.sleep(60)
        return original(file, *arguments)
    return method
setattr(partial_file.PartialFile, name, stop(getattr(partial_file.PartialFile, name)))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(4):
        write_dataset(
            tmp_path / "shards" / f"s.{number}",
            random_documents(number, 20),
            change=lambda manifest: replace(manifest, rejected_documents=0),
        )
    everything = [document for number in range(4) for document in random_documents(number, 20)]
    write_dataset(tmp_path / "once", everything)
    return tmp_path / "shards"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def assert_merged(tmp_path: Path) -> None:
    for ending in ("bin", "idx"):
        assert (tmp_path / f"out/all.{ending}").read_bytes() == (tmp_path / f"once.{ending}").read_bytes()
    assert files(tmp_path / "out") == {"all.bin", "all.idx", "all.json"}


def test_merges_and_says_what_there_is(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "out/all"
    done = run("--input", shards / "s.*.idx", "--output-prefix", out, "--expect", 4)
    assert (done.returncode, done.stderr) == (0, "")
    tokens = IndexedDataset(out).num_tokens
    assert done.stdout == f"{out}: 80 documents, {tokens} tokens (uint16)\n"
    assert_merged(tmp_path)
    done = run("--input", *(shards / f"s.{i}" for i in range(4)), "--output-prefix", out)
    assert done.returncode == 78
    assert done.stderr.startswith("error: ") and "exists; choose another --output-prefix" in done.stderr
    (shards / "s.1.json").unlink()
    done = run(
        "--input", shards / "s.*.idx", "--output-prefix", out, "--overwrite", "--allow-missing-manifests"
    )
    assert done.returncode == 0 and done.stdout.endswith("no manifest, as not all inputs have one\n")
    assert files(tmp_path / "out") == {"all.bin", "all.idx"}


def test_records_that_the_inputs_lack_show_as_exit_code_3(tmp_path: Path, shards: Path) -> None:
    write_dataset(shards / "s.4", random_documents(4, 5))  # its manifest says that 3 records were left out
    done = run("--input", shards / "s.*.idx", "--output-prefix", tmp_path / "out/all", "--expect", 5)
    assert (done.returncode, done.stderr) == (3, "warning: 3 bad records were left out of the inputs\n")
    manifest = read_manifest(tmp_path / "out/all")
    assert manifest is not None and (manifest.documents, manifest.rejected_documents) == (85, 3)


def test_refusals_are_one_line(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "out/all"
    path = shards / "s.2.bin"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    for options, message in (
        (["--expect", "5"], "4 of 5 expected datasets found"),
        ([], "s.2.bin: damaged: block 0"),
    ):
        done = run("--input", shards / "s.*.idx", "--output-prefix", out, *options)
        assert (done.returncode, done.stdout) == (78, "")
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
        assert files(tmp_path / "out") == set()
    assert run("--input", shards / "s.*.idx", "--output-prefix", out, "--no-verify").returncode == 0


@pytest.mark.parametrize("place", ["write", "publish"])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_run_again(tmp_path: Path, shards: Path, place: str, kill: signal.Signals) -> None:
    arguments = ["--input", str(shards / "s.*.idx"), "--output-prefix", str(tmp_path / "out/all")]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING, place, str(TOOL), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    time.sleep(0.1)
    os.kill(process.pid, kill)
    _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 128 + 15, signal.SIGINT: 130}
    assert process.returncode == expected[kill]
    left = {"write": {"all.bin.partial"}, "publish": {"all.bin", "all.idx.partial"}}[place]
    if kill != signal.SIGKILL:
        left = {name for name in left if not name.endswith(".partial")}
    assert files(tmp_path / "out") == left
    assert run(*arguments, "--overwrite").returncode == 0
    assert_merged(tmp_path)
    assert read_manifest(tmp_path / "out/all") is not None


def test_shards_of_preprocessing_become_what_one_call_makes(tmp_path: Path) -> None:
    texts = [text for _, text in sorted(topics.items())]
    for number in range(3):
        lines = (
            json.dumps({"text": text, "meta": {"pile_set_name": f"set {i % 2}"}})
            for i, text in enumerate(texts[number::3])
        )
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    train_tokenizer([str(tmp_path / "0.jsonl")], 400, str(tmp_path / "tokenizer"))
    command = [sys.executable, str(TOOL.with_name("preprocess_data.py")), "--workers", "1", "--append-eod"]
    command += ["--input", str(tmp_path / "*.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    command += ["--output-prefix", str(tmp_path / "c")]
    for shard in (["--shard", "0/2"], ["--shard", "1/2"], []):
        subprocess.run([*command, *shard], check=True, capture_output=True, timeout=120)
    out = tmp_path / "all"
    assert run("--input", tmp_path / "c.shard-*", "--output-prefix", out, "--expect", 2).returncode == 0
    for ending in ("bin", "idx", "json"):
        once = tmp_path / f"c_text_document.{ending}"
        assert Path(f"{out}.{ending}").read_bytes() == once.read_bytes(), ending
