"""Memory and speed of tools/preprocess_data.py on a large compressed file, made on the spot.

Fails where the peak exceeds --limit-mb. Memory is sampled 20 times a second in the run that is timed, which
costs a little time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from benchmarks.commands import run_command
from benchmarks.machine import describe_machine, versions_of, warn_if_busy, write_result
from benchmarks.preprocess import open_case
from benchmarks.sample_text import repeated, speeches, write_json_lines
from benchmarks.sample_tokenizers import train_sample_tokenizers
from megatron_lpa.data.storage.dataset_manifest import read_manifest
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.documents import read_texts

HELP = "peak memory of preprocessing a large file"
_DISK_SHARE = 1.1  # of the text: 0.5 compressed, 0.5 token ids (2 bytes for 4 and more characters), and some
_BASE_DOCUMENTS = 50_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, default=10.0, metavar="N", help="size of the text (default: 10)")
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help=(
            "JSON lines whose first 50,000 texts are repeated with variation (default: the text of the demo)"
        ),
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="default: a small one, trained on the text"
    )
    parser.add_argument(
        "--limit-mb", type=float, default=2048 * 1.048576, help="fail above this (default: 2 GiB)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the result")
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="where to work; 1.1 times the text's size"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a line, and records where asked.

    Raises:
        UserError: too little disk, bad options, or too much memory.
    """
    if not arguments.gb > 0:
        raise UserError(f"--gb is {arguments.gb}; give more than 0")
    machine = describe_machine()
    warn_if_busy(machine)
    if arguments.scratch is not None:
        arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark.", dir=arguments.scratch) as folder:
        scratch = Path(folder).resolve()
        free, needed = shutil.disk_usage(scratch).free, _DISK_SHARE * arguments.gb * 1e9
        if free < needed:
            raise UserError(
                f"{scratch.parent}: {free / 1e9:.1f} GB are free and {needed / 1e9:.1f} GB needed; "
                "choose another --scratch or a smaller --gb"
            )
        texts = (
            speeches()
            if arguments.input is None
            else list(islice(read_texts([str(arguments.input)]), _BASE_DOCUMENTS))
        )
        path = scratch / "input.jsonl.zst"
        start = time.perf_counter()
        name = "sotu" if arguments.input is None else arguments.input.name
        documents, text_bytes = write_json_lines(path, repeated(texts, arguments.gb * 1e9), subset=name)
        del texts
        print(
            f"made {path.stat().st_size / 1e9:.2f} GB of .jsonl.zst in {time.perf_counter() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        case = open_case(path, arguments.tokenizer or train_sample_tokenizers(path, scratch)[0])
        finished = run_command("ours", case.command("ours", scratch / "out"), sample_memory=True)
        manifest = read_manifest(scratch / "out_text_document")
        assert manifest is not None and finished.peak_memory_bytes is not None
        assert (manifest.documents, manifest.bytes_text) == (documents, text_bytes)
        result = {
            "benchmark": "preprocess-memory",
            "machine": machine,
            "versions": versions_of(("megatron_lpa", "gigatoken", "tokenizers", "sentencepiece", "orjson",
            "zstandard")),
            "input": {
                "name": f"{name}, repeated with variation to {arguments.gb:g} GB",
                "compressed_bytes": path.stat().st_size,
                "text_bytes": text_bytes,
                "documents": documents,
            },
            "tokenizer": f"{case.tokenizer_path.parent.name}/{case.tokenizer_path.name}",
            "tokenizer_sha256": case.tokenizer.fingerprint,
            "engine": case.tokenizer.engine,
            "workers": case.cores,
            "tokens": manifest.tokens,
            "seconds": finished.seconds,
            "mb_per_second": text_bytes / 1e6 / finished.seconds,
            "tokens_per_second_per_core": manifest.tokens / finished.seconds / case.cores,
            "peak_memory_mb": finished.peak_memory_bytes / 1e6,
            "memory_kind": finished.memory_kind,
            "limit_mb": arguments.limit_mb,
        }  # fmt: skip
    print(
        f"{text_bytes / 1e9:.2f} GB of text in {finished.seconds:.1f} s ({result['mb_per_second']:.1f} MB/s, "
        f"{case.cores} workers, engine {case.tokenizer.engine}): at most {result['peak_memory_mb']:.0f} MB "
        f"of memory ({finished.memory_kind} of all processes together)"
    )
    write_result(arguments.output, result)
    if finished.peak_memory_bytes / 1e6 > arguments.limit_mb:
        raise UserError(
            f"peak memory {result['peak_memory_mb']:.0f} MB exceeds --limit-mb {arguments.limit_mb:.0f}"
        )
