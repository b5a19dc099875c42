"""Two other ways from JSON lines to ``.bin`` and ``.idx``, written anew from their descriptions.

    python -m benchmarks.preprocess_methods METHOD --input FILE.jsonl.zst --output-prefix PREFIX ...

``plain`` is the method of Megatron-LM's ``tools/preprocess_data.py``: a pool of processes, each parsing and
tokenizing one line at a time with the tokenizer's own library, and one process that adds document after
document to megatron-core's ``IndexedDatasetBuilder``. That tool reads no ``.zst``; here its first process
gets the lines from a decompressing stream, which favours it.

``fast`` is the method of its ``tools/preprocess_data_fast.py``: gigatoken reads, parses and tokenizes a plain
file with threads, the ids of the whole file lie in memory, and the same builder writes them, here from views
of one NumPy array. ``fast-bulk`` differs in writing: all tokens at once instead of document by document. Both
begin with ``zstd -d`` to a temporary file, whose time is reported apart.

Neither makes a manifest or checksums, brings files to disk (fsync), or can go on after a kill.

The output is a JSON object: ``work_seconds`` (all but start-up and end of the process; start-up is importing
packages and, for ``fast``, loading the tokenizer) and, as a part of these, ``decompress_seconds``.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

METHODS = ("plain", "fast", "fast-bulk")
CHUNK_LINES = 32  # what Megatron-LM's tool gives a worker at a time

_encode_text: Callable[[str], list[int]]  # set once in each worker process


def reference_encoder(tokenizer: str) -> Callable[[str], list[int]]:
    """Text to ids by the library that the file is made for."""
    if tokenizer.endswith(".json"):
        import tokenizers

        hugging_face = tokenizers.Tokenizer.from_file(tokenizer)
        hugging_face.no_truncation()
        hugging_face.no_padding()
        return lambda text: hugging_face.encode(text, add_special_tokens=False).ids
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    return processor.encode_as_ids


def _initialize_worker(tokenizer: str) -> None:
    global _encode_text
    _encode_text = reference_encoder(tokenizer)


def _encode_line(line: str) -> tuple[list[int], int]:
    return _encode_text(json.loads(line)["text"]), len(line)


def _lines(path: Path) -> Iterator[str]:
    import zstandard

    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        yield from io.TextIOWrapper(stream, encoding="utf-8", newline="\n")


def run_plain(arguments: argparse.Namespace) -> dict[str, float]:
    """One line at a time, one document at a time."""
    builder = _builder(arguments)
    start = time.perf_counter()
    context = multiprocessing.get_context("fork")  # what Megatron-LM's tool gets on Linux
    with context.Pool(arguments.workers, _initialize_worker, (arguments.tokenizer,)) as pool:
        for ids, _ in pool.imap(_encode_line, _lines(arguments.input), CHUNK_LINES):
            if ids:
                ids.append(arguments.eod_id)
                builder.add_document(ids, [len(ids)])
    builder.finalize(f"{arguments.output_prefix}.idx")
    return {"work_seconds": time.perf_counter() - start, "decompress_seconds": 0.0}


def run_fast(arguments: argparse.Namespace) -> dict[str, float]:
    """The whole file at once."""
    import awkward
    import gigatoken

    builder = _builder(arguments)
    if arguments.tokenizer.endswith(".json"):
        tokenizer = gigatoken.Tokenizer(arguments.tokenizer)
    else:
        tokenizer = gigatoken.Tokenizer.from_sentencepiece(arguments.tokenizer)

    start = time.perf_counter()
    plain = Path(f"{arguments.output_prefix}.jsonl")
    decompress(arguments.input, plain)
    decompress_seconds = time.perf_counter() - start

    # The process is not a worker and has made no fork, so this uses all cores.
    documents = tokenizer.encode_files(gigatoken.JsonlFileSource([plain], "text"))
    plain.unlink()
    sizes = awkward.num(documents).to_numpy()
    if not sizes.all():
        documents, sizes = documents[sizes > 0], sizes[sizes > 0]
    ends = np.full((len(sizes), 1), arguments.eod_id, dtype=np.uint32)
    documents = awkward.concatenate([documents, ends], axis=1)
    tokens = awkward.flatten(documents).to_numpy().astype(arguments.dtype)
    sizes = (sizes + 1).tolist()
    if arguments.method == "fast-bulk":
        builder.data_file.write(tokens.data)
        builder.sequence_lengths = sizes
        builder.document_indices = list(range(len(sizes) + 1))
    else:
        start_token = 0
        for size in sizes:
            builder.add_document(tokens[start_token : start_token + size], [size])
            start_token += size
    builder.finalize(f"{arguments.output_prefix}.idx")
    return {"work_seconds": time.perf_counter() - start, "decompress_seconds": decompress_seconds}


def decompress(source: Path, target: Path) -> None:
    """By the program ``zstd``, or without it by the Python package."""
    if shutil.which("zstd"):
        subprocess.run(["zstd", "-d", "-q", "-f", str(source), "-o", str(target)], check=True)
        return
    import zstandard

    with source.open("rb") as compressed, target.open("wb") as plain:
        stream = zstandard.ZstdDecompressor().stream_reader(compressed, read_across_frames=True)
        shutil.copyfileobj(stream, plain, 1 << 22)


def _builder(arguments: argparse.Namespace):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    return IndexedDatasetBuilder(f"{arguments.output_prefix}.bin", dtype=np.dtype(arguments.dtype).type)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--input", type=Path, required=True, help=".jsonl.zst file")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json or SentencePiece .model file")
    parser.add_argument("--eod-id", type=int, required=True, help="id that ends every document")
    parser.add_argument("--dtype", choices=["uint16", "int32"], required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--workers", type=int, required=True, help="processes of the plain method")
    arguments = parser.parse_args()
    print(json.dumps(run_plain(arguments) if arguments.method == "plain" else run_fast(arguments)))


if __name__ == "__main__":
    main()
