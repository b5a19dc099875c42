"""How long a run waits for its data: the sample index of 51.2 million documents, made, found again, and read.

Makes a dataset of the wanted size with a real index and token ids that are all zero (a sparse file, so it
needs 20 bytes of disk per document), opens it in fresh processes with this package and, where it is
installed, with megatron-core, and reads shuffled samples of a smaller dataset with real bytes. Page caches
are as they are after writing: warm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine, versions_of, warn_if_busy, write_result
from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.splits import open_splits
from megatron_lpa.data.storage.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter

HELP = "how long a run waits for its data: the sample index made, found again, and read"
ROOT = Path(__file__).resolve().parents[1]
BATCH = 16
SPLIT = "969,30,1"


def sparse_dataset(prefix: Path, documents: int) -> int:
    """Documents of 1 to 1999 tokens, 1000 on average; the number of tokens."""
    sizes = np.random.default_rng(0).integers(1, 2000, documents, dtype=np.int32)
    pointers = np.cumsum(sizes, dtype=np.int64)
    num_tokens = int(pointers[-1])
    pointers -= sizes
    pointers *= 2
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[np.dtype("<u2")], documents, documents + 1))
        for part in (sizes, pointers, np.arange(documents + 1, dtype=np.int64)):
            file.write(part.data)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * num_tokens)
    return num_tokens


def real_dataset(prefix: Path) -> None:
    """100,000 documents, 100 million tokens, all bytes there."""
    generator = np.random.default_rng(1)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(50):
            sizes = generator.integers(1, 2000, 2000)
            writer.add_documents(generator.integers(0, 32000, int(sizes.sum())).astype(np.uint16), sizes)


def ours(prefix: str, sequence_length: int) -> tuple[int, Callable[[np.ndarray], object]]:
    """Samples of the training split, and how to read some at shuffled positions."""
    train = open_splits(DataConfig(prefix=prefix, split=SPLIT), sequence_length, seed=1).train
    return train.num_samples, lambda positions: train.read(train.shuffled(positions))


def megatrons(prefix: str, sequence_length: int) -> tuple[int, Callable[[np.ndarray], object]]:
    """The same with megatron-core's GPTDataset; its train split is the first documents of the file."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        eod = 0
        pad = 1
        vocab_size = 32000
        unique_identifiers = {"class": "none"}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=sequence_length, blend=([prefix], None), split=SPLIT,
        path_to_cache=f"{prefix}.megatron", tokenizer=Tokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
    return len(train), lambda positions: np.stack([train[int(position)]["tokens"] for position in positions])


def peak_rss_mib() -> float:
    """Of this process alone; getrusage's number survives exec and would be the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure_once(which: str, prefix: str, sequence_length: int, batches: int) -> dict[str, float]:
    """Open and read in this process: seconds, samples per second, and the peak of its memory."""
    if which == "megatron":
        import megatron.core.datasets.gpt_dataset  # noqa: F401 - imports are not what is measured
    before_mib = peak_rss_mib()
    started = time.perf_counter()
    num_samples, read = (ours if which == "ours" else megatrons)(prefix, sequence_length)
    opened = time.perf_counter()
    read(np.arange(BATCH))
    first = time.perf_counter()
    for number in range(1, batches + 1):
        read(np.arange(number * BATCH, (number + 1) * BATCH) % num_samples)
    end = time.perf_counter()
    result = {
        "open_s": opened - started,
        "first_batch_ms": 1000 * (first - opened),
        "peak_rss_mib": peak_rss_mib(),
        "rss_before_mib": before_mib,
        "samples": num_samples,
    }
    return result | ({"samples_per_second": batches * BATCH / (end - first)} if batches else {})


def measure(which: str, prefix: Path, sequence_length: int, batches: int = 0) -> dict[str, float] | str:
    """:func:`measure_once` in a process of its own; the last line of its error where it fails."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.data_index",
        which,
        str(prefix),
        str(sequence_length),
        str(batches),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--documents", type=int, default=51_200_000, metavar="N")
    parser.add_argument("--sequence-length", type=int, default=4096, metavar="S")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="first openings measured of each")
    parser.add_argument("--megatron", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="where to make the data; 20 bytes a document"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the result")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table, and records where asked."""
    machine = describe_machine()
    warn_if_busy(machine)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        tokens, measured = _measure_all(arguments, Path(folder))
    result = {
        "benchmark": "data-index",
        "machine": machine,
        "versions": versions_of(["megatron_lpa", "megatron-core", "numpy"]),
        "documents": arguments.documents,
        "tokens": tokens,
        "sequence_length": arguments.sequence_length,
        "results": measured,
    }
    print(
        f"{arguments.documents:,} documents, {tokens:,} tokens, sequence length {arguments.sequence_length:,}"
    )
    print(
        f"{'':10}{'first open s':>24}{'later s':>10}{'peak MiB':>10}{'first batch ms':>16}{'samples/s':>12}"
    )
    for which, found in measured.items():
        opens = [entry for entry in found["first_opens"] if not isinstance(entry, str)]
        if not opens:
            print(f"{which:10}{found['first_opens'][0]}")
            continue
        times = " ".join(f"{entry['open_s']:.2f}" for entry in opens)
        print(
            f"{which:10}{times:>24}{found['later_open']['open_s']:>10.2f}"
            f"{max(entry['peak_rss_mib'] for entry in opens):>10.0f}"
            f"{found['later_open']['first_batch_ms']:>16.1f}{found['reads']['samples_per_second']:>12,.0f}"
        )
    write_result(arguments.output, result)


def _measure_all(arguments: argparse.Namespace, folder: Path) -> tuple[int, dict[str, Any]]:
    big, small = folder / "big", folder / "small"
    tokens = sparse_dataset(big, arguments.documents)
    real_dataset(small)
    measured: dict[str, Any] = {}
    whiches = ("ours", "megatron") if arguments.megatron else ("ours",)
    for which in whiches:
        measured[which] = {"first_opens": []}
    for _ in range(arguments.repeat):  # in turn, so that a drift of the machine hits both
        for which in whiches:
            shutil.rmtree(f"{big}.cache", ignore_errors=True)
            shutil.rmtree(f"{big}.megatron", ignore_errors=True)
            measured[which]["first_opens"].append(measure(which, big, arguments.sequence_length))
            measured[which]["later_open"] = measure(which, big, arguments.sequence_length)
    for which in whiches:
        measured[which]["reads"] = [measure(which, small, arguments.sequence_length, 500) for _ in range(2)][
            1
        ]
    return tokens, measured


if __name__ == "__main__":
    _, which_, prefix_, sequence_length_, batches_ = sys.argv
    print(json.dumps(measure_once(which_, prefix_, int(sequence_length_), int(batches_))))
