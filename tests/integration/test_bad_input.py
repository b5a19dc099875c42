"""Bad input ends with one clear message on rank 0 and one exit code on all ranks: 78, as trying again is no
use."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from launching import SMALL, Launch, launch

from megatron_lpa.data.storage.dataset_manifest import Checksums, Manifest, TokenizerRecord, write_manifest
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter


def manifest(fingerprint: str, vocab_size: int) -> Manifest:
    """Of 50 documents of 41 tokens, made with a tokenizer of this fingerprint."""
    tokenizer = TokenizerRecord(f"tokenizer-{fingerprint[0]}", fingerprint, vocab_size, None)
    return Manifest(
        documents=50, tokens=2050, empty_documents=0, dropped_documents=0, rejected_documents=0,
        bytes_text=1, words=1, dtype="uint16", json_key="text", append_eod=True, tokenizer=tokenizer,
        checksums=Checksums([], []), sources=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")

    def write(name: str, documents: int, length: int, largest: int) -> None:
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for number in range(documents):
                ids = np.arange(number, number + length) % largest
                writer.add_document(np.append(ids, largest - 1).astype(np.uint16))

    write("good", 50, 40, 97)
    write("foreign", 50, 40, 200)
    write("short", 1, 10, 97)
    for broken in ("truncated_bin", "truncated_idx", "wrong_magic", "no_bin"):
        write(broken, 50, 40, 97)
    for name, suffix in (("truncated_bin", ".bin"), ("truncated_idx", ".idx")):
        path = folder / (name + suffix)
        path.write_bytes(path.read_bytes()[:-6])
    write("recorded", 50, 40, 97)
    write_manifest(folder / "recorded", manifest("1" * 64, vocab_size=32000))
    for name, mark in (("made_by_one", "1"), ("made_by_two", "2")):
        write(name, 50, 40, 98 - int(mark))
        write_manifest(folder / name, manifest(mark * 64, vocab_size=97))
    with IndexedDatasetWriter(folder / "odd_valid", np.uint16) as writer:  # one odd id, which rank 1 reads
        ids = np.arange(200) % 97
        ids[3 * 16] = 500
        writer.add_document(ids.astype(np.uint16))
    path = folder / "wrong_magic.idx"
    path.write_bytes(b"NOTMINE\0\0" + path.read_bytes()[9:])
    (folder / "no_bin.bin").unlink()
    return folder


DATA = ["--data.prefix", "good", "--data.split", "100,0,0", "--train.eval_interval", "0"]
CASES = {
    "missing dataset": (DATA[2:], ["--data.prefix", "nowhere"], ["nowhere.idx", "preprocess_data.py"]),
    "missing bin": (DATA[2:], ["--data.prefix", "no_bin"], ["no_bin.bin"]),
    "truncated bin": (DATA[2:], ["--data.prefix", "truncated_bin"], ["truncated_bin.bin"]),
    "no folder for the index": (DATA, ["--data.cache_dir", "good.bin/x"], ["good.bin/x", "data.cache_dir"]),
    "truncated idx": (DATA[2:], ["--data.prefix", "truncated_idx"], ["truncated_idx.idx"]),
    "wrong magic": (DATA[2:], ["--data.prefix", "wrong_magic"], ["wrong_magic.idx"]),
    "id beyond the vocabulary": (DATA[2:], ["--data.prefix", "foreign"], ["foreign", "96", "vocab_size"]),
    "id beyond the vocabulary in validation": (
        ["--data.train_prefix", "good", "--train.eval_interval", "1"], ["--data.valid_prefix", "odd_valid"],
        ["odd_valid", "500"],
    ),
    "data of a larger tokenizer": (DATA[2:], ["--data.prefix", "recorded"], ["recorded.json", "32000", "97"]),
    "data of two tokenizers": (
        ["--train.eval_interval", "0"], ["--data.blend", '{"made_by_one": 1, "made_by_two": 2}'],
        ["made_by_one.json", "made_by_two.json", "tokenizer-1", "tokenizer-2"],
    ),
    "too few tokens": (
        DATA, ["--train.steps", "null", "--train.tokens", "51e9"],
        ["train.tokens is 51,000,000,000", "good", "2,048 there", "data.allow_repeats"],
    ),
    "too few tokens in a blend": (
        [], ["--data.blend", '{"good": 0.75, "foreign": 0.25}', "--train.steps", "null", "--train.tokens",
        "1e5"],
        ["good (75 % of the samples)", "foreign (25 % of the samples)", "short"],
    ),
    "missing tokenizer": (DATA, ["--data.tokenizer", "/nowhere/tokenizer.json"], ["/nowhere/tokenizer.json"]),
    "shorter than one sequence": (DATA[2:], ["--data.prefix", "short"], ["short", "11", "17"]),
    "heads and TP": (DATA, ["--parallel.tensor_parallel_size", "2", "--model.num_heads", "1",
    "--model.head_dim", "32"],
                     ["model.num_heads", "tensor_parallel_size"]),
    "rank and TP": (DATA, ["--parallel.tensor_parallel_size", "2", "--model.projections.v.rank", "7"],
                    ["model.projections.v.rank", "tensor_parallel_size"]),
    "vocabulary and TP": (DATA, ["--parallel.tensor_parallel_size", "2"], ["vocab",
    "pad_vocab_to_multiple_of"]),
    "world and TP": (DATA, ["--parallel.tensor_parallel_size", "4", "--model.pad_vocab_to_multiple_of", "4"],
                     ["world size", "tensor_parallel_size"]),
    "unknown preset": (DATA, ["--preset", "tiny/lap"], ["tiny/lap", "tiny/lpa"]),
    "unknown key": (DATA, ["--model.hiden_size", "64"], ["--model.hiden_size", "--model.hidden_size"]),
    "wrong type": (DATA, ["--train.seed", "many"], ["train.seed", "many"]),
    "batch and world": (DATA, ["--train.global_batch_size", "10"], ["train.global_batch_size", "10"]),
    "ZeRO file": (DATA, ["--train.deepspeed_config", "zero4"], ["zero4", "zero3"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_message_and_one_exit_code_everywhere(folder, case):
    base, more, expected = CASES[case]
    name = case.replace(" ", "-")
    finished = launch([*SMALL, *base, *more, "--logging.name", name], 2, folder)
    assert finished.codes == [78, 78], finished.stderr
    told, *others = finished.errors
    # Before the processes have met, each can only tell for itself, and does where no launcher ends it.
    assert [line.partition("): ")[2] for line in others] in ([], [told.removeprefix("error: ")]), (
        finished.errors
    )
    assert all(line.startswith("error: rank 1 (") for line in others)
    for part in expected:
        assert part in finished.errors[0]
    assert finished.stderr[0].count("error:") == 1 and "Traceback" not in "".join(finished.stderr)


def test_a_checkpoint_of_another_model_is_refused(folder):
    few = ["--train.steps", "1", "--logging.name", "mine"]
    assert launch([*SMALL, *DATA, *few], 1, folder).codes == [0]
    finished = launch([*SMALL, *DATA, *few, "--model.num_layers", "3"], 1, folder)
    assert finished.codes == [78]
    assert "model.num_layers was 2, is 3" in finished.errors[0]


def test_a_checkpoint_of_other_data_is_refused(folder):
    """The same number of samples, but other text: only the hash of the contents tells."""
    few = [*DATA[2:], "--train.steps", "1", "--logging.name", "ours"]
    assert launch([*SMALL, *few, "--data.prefix", "good"], 1, folder).codes == [0]
    # Elsewhere, with another date, it is the same data.
    for suffix in (".bin", ".idx"):
        (folder / f"moved{suffix}").write_bytes((folder / f"good{suffix}").read_bytes())
    assert launch([*SMALL, *few, "--data.prefix", "moved"], 1, folder).codes == [0]
    text = bytearray((folder / "moved.bin").read_bytes())
    text[:2] = text[2:4]
    (folder / "moved.bin").write_bytes(text)
    finished = launch([*SMALL, *few, "--data.prefix", "moved"], 1, folder)
    assert finished.codes == [78]
    assert "order.data.contents was" in finished.errors[0] and "order.seed" not in finished.errors[0]


METRICS_ON_A_FULL_DISK = """
import sys
if "megatron_lpa.pretrain" in sys.orig_argv:
    import megatron_lpa.train.callbacks.sinks as sinks
    real = sinks.open_own
    class Full:
        def __init__(self, file):
            self.file = file
        def write(self, data):
            with open("/dev/full", "wb", buffering=0) as full:
                return full.write(data)
        def __getattr__(self, name):
            return getattr(self.file, name)
    sinks.open_own = lambda path, **options: Full(real(path, **options))
"""


def test_metrics_that_cannot_be_written_end_the_run_on_all_ranks(folder, tmp_path, monkeypatch):
    run = folder / "runs" / "full"
    (tmp_path / "sitecustomize.py").write_text(METRICS_ON_A_FULL_DISK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    finished = launch([*SMALL, *DATA, "--train.steps", "4", "--logging.name", "full"], 2, folder)
    assert finished.codes == [1, 1], finished.stderr
    assert len(finished.errors) == 1
    assert finished.stderr[0].count("warning: metrics cannot be written, and wait in memory") == 1
    assert (run / "checkpoints" / "step_00000004").is_dir(), (
        "the work of a run is not lost for want of its records"
    )
    assert str(Path("runs") / "full") in finished.errors[0] and "cannot be written" in finished.errors[0]
    assert "Traceback" not in "".join(finished.stderr)


def test_two_runs_never_write_one_folder(folder, monkeypatch):
    more = ["--logging.name", "shared", "--train.steps", "2000"]
    first = Launch([*SMALL, *DATA, *more], 1, folder)
    deadline = time.monotonic() + 60
    while not (folder / "runs" / "shared" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = launch([*SMALL, *DATA, *more, "--train.lock_wait_s", "0.5"], 1, folder)
    first.processes[0].terminate()
    assert second.codes == [1]
    assert len(second.errors) == 1
    holder = f"another run is writing here (process {first.processes[0].pid} on "
    assert holder in second.errors[0]
    assert second.stderr[0].count(holder) == 2, "and it said at once why it waits"
    assert first.wait().codes == [128 + 15]
