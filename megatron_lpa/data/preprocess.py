"""Raw text to token files: read in one process, parse and tokenize in several, write in one."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import megatron_lpa
from megatron_lpa.data.files import explained_write_errors, write_json
from megatron_lpa.data.indexed import IndexedDatasetWriter, best_dtype, bin_path, idx_path
from megatron_lpa.data.ordered_pool import ordered_map
from megatron_lpa.data.text import RawRecord, parse, read_raw, resolve_inputs
from megatron_lpa.data.tokenizer import Tokenizer, load_tokenizer
from megatron_lpa.errors import UserError

_CHUNK_BYTES = 1 << 19
_CHUNK_RECORDS = 512


@dataclass(frozen=True)
class PreprocessConfig:
    """What to tokenize.

    Args:
        inputs: files, folders and glob patterns; see ``text.py``.
        output_prefix: outputs are ``<output_prefix>_<key>_document.{bin,idx,json}``.
        tokenizer: what :func:`load_tokenizer` takes.
        json_keys: keys of the JSON lines to tokenize, each into its own dataset.
        append_eod: end every document with the tokenizer's end-of-document token.
        workers: processes that tokenize; the output does not depend on it.
        log_interval: documents between progress lines; 0 prints none.
        overwrite: replace existing outputs.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    log_interval: int = 10_000
    overwrite: bool = False


@dataclass
class Counts:
    """Totals of one output. Text counts are of the kept documents; words are runs of non-blanks."""

    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    bytes_text: int = 0
    words: int = 0

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.empty_documents += other.empty_documents
        self.bytes_text += other.bytes_text
        self.words += other.words


@dataclass(frozen=True)
class EncodedChunk:
    """The documents of a chunk under one key: all ids ``(tokens,)``, the length of each, and counts."""

    tokens: np.ndarray
    sizes: np.ndarray
    counts: Counts


@dataclass
class _Worker:
    """What a worker process keeps between chunks."""

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    eod_id: int | None
    dtype: np.dtype[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = best_dtype(self.tokenizer.vocab_size)

    def encode(self, texts: list[str]) -> EncodedChunk:
        counts, sizes, ids = Counts(), [], []
        for text, document in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            if not document:
                counts.empty_documents += 1
                continue
            if self.eod_id is not None:
                document.append(self.eod_id)
            ids.append(np.array(document, dtype=self.dtype))
            sizes.append(len(document))
            counts.bytes_text += len(text) if text.isascii() else len(text.encode())
            counts.words += len(text.split())
        counts.documents, counts.tokens = len(sizes), sum(sizes)
        tokens = np.concatenate(ids) if ids else np.empty(0, dtype=self.dtype)
        return EncodedChunk(tokens, np.array(sizes, dtype=np.int64), counts)


_worker: _Worker | None = None  # set once in each worker process, never in the parent


def _initialize_worker(tokenizer: str, keys: tuple[str, ...], append_eod: bool) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    loaded = load_tokenizer(tokenizer)
    _worker = _Worker(loaded, keys, loaded.eod_id if append_eod else None)


def _encode_chunk(records: list[RawRecord]) -> list[EncodedChunk]:
    assert _worker is not None
    parsed = [parse(record, _worker.keys) for record in records]
    return [_worker.encode([texts[i] for texts in parsed]) for i in range(len(_worker.keys))]


def _chunks(records: Iterable[RawRecord]) -> Iterator[list[RawRecord]]:
    chunk: list[RawRecord] = []
    size_bytes = 0
    for record in records:
        chunk.append(record)
        size_bytes += len(record.data)
        if size_bytes >= _CHUNK_BYTES or len(chunk) >= _CHUNK_RECORDS:
            yield chunk
            chunk, size_bytes = [], 0
    if chunk:
        yield chunk


class _Progress:
    def __init__(self, interval: int) -> None:
        self._interval, self._next, self._start = interval, interval, time.monotonic()
        self.documents = self.bytes_text = 0

    def add(self, counts: Counts) -> None:
        self.documents += counts.documents + counts.empty_documents
        self.bytes_text += counts.bytes_text
        if self._interval and self.documents >= self._next:
            self._next = self.documents - self.documents % self._interval + self._interval
            self.report()

    def report(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        print(
            f"{self.documents} documents, {self.documents / seconds:.0f} documents/s, "
            f"{self.bytes_text / seconds / 1e6:.2f} MB/s",
            file=sys.stderr,
            flush=True,
        )


def output_prefix(prefix: str, key: str) -> str:
    """Megatron's name for the dataset of one key."""
    return f"{prefix}_{key}_document"


def preprocess(config: PreprocessConfig) -> dict[str, dict[str, Any]]:
    """Tokenizes and writes every output, each whole or not at all.

    Documents without tokens are left out and counted. The manifest ``<prefix>_<key>_document.json`` is
    written last.

    Returns:
        the manifest of each output by its prefix.

    Raises:
        UserError: bad input, tokenizer or options, existing output, a full disk, or a dead worker.
    """
    files = resolve_inputs(config.inputs)
    _check_options(config)
    tokenizer = load_tokenizer(config.tokenizer)
    if config.append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"tokenizer {config.tokenizer!r} has no end-of-document token, so --append-eod cannot work; "
            "name one as eos_token in its tokenizer_config.json, or leave --append-eod out"
        )
    prefixes = [output_prefix(config.output_prefix, key) for key in config.json_keys]
    _check_outputs(prefixes, config.overwrite)
    dtype = best_dtype(tokenizer.vocab_size)
    totals = [Counts() for _ in prefixes]
    progress = _Progress(config.log_interval)
    records = (record for file in files for record in read_raw(file))
    results = ordered_map(
        _encode_chunk,
        _chunks(records),
        config.workers,
        _initialize_worker,
        (config.tokenizer, config.json_keys, config.append_eod),
    )
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(prefix, dtype)) for prefix in prefixes]
        stack.enter_context(contextlib.closing(results))  # closed first: no worker outlives the writers
        for chunk in results:
            for writer, total, encoded in zip(writers, totals, chunk, strict=True):
                writer.add_documents(encoded.tokens, encoded.sizes)
                total.add(encoded.counts)
            progress.add(chunk[0].counts)
        for key, total in zip(config.json_keys, totals, strict=True):
            if total.documents == 0:
                raise UserError(
                    f"{', '.join(config.inputs)}: no document has tokens under {key!r} "
                    f"({total.empty_documents} are empty); check the input"
                )
        for prefix in prefixes:  # a manifest must never describe other files than its own
            with explained_write_errors(Path(f"{prefix}.json")):
                Path(f"{prefix}.json").unlink(missing_ok=True)
    if config.log_interval:
        progress.report()
    manifests = {}
    for prefix, key, total in zip(prefixes, config.json_keys, totals, strict=True):
        manifests[prefix] = _manifest(config, key, total, dtype, tokenizer, files)
        write_json(Path(f"{prefix}.json"), manifests[prefix])
    return manifests


def _check_options(config: PreprocessConfig) -> None:
    if config.workers < 1:
        raise UserError(f"--workers is {config.workers}; give 1 or more")
    if config.log_interval < 0:
        raise UserError(f"--log-interval is {config.log_interval}; give 0 or more")
    if not config.json_keys or len(set(config.json_keys)) != len(config.json_keys):
        raise UserError(f"--json-keys is {' '.join(config.json_keys)!r}; give one or more different keys")
    for key in config.json_keys:
        if "/" in key:
            raise UserError(f"--json-keys: {key!r} cannot be part of a file name; rename the key")


def _check_outputs(prefixes: list[str], overwrite: bool) -> None:
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix), Path(f"{prefix}.json")):
            if path.exists() and not overwrite:
                raise UserError(f"{path}: exists; choose another --output-prefix or pass --overwrite")


def _manifest(
    config: PreprocessConfig,
    key: str,
    counts: Counts,
    dtype: np.dtype[Any],
    tokenizer: Tokenizer,
    files: list[Path],
) -> dict[str, Any]:
    return {
        "documents": counts.documents,
        "tokens": counts.tokens,
        "empty_documents": counts.empty_documents,
        "bytes_text": counts.bytes_text,
        "words": counts.words,
        "dtype": dtype.name,
        "json_key": key,
        "append_eod": config.append_eod,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "inputs": [{"path": str(file), "size_bytes": file.stat().st_size} for file in files],
        "version": megatron_lpa.__version__,
    }
