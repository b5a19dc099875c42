"""Token datasets with a manifest, made by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lpa.data.storage.checksums import block_digests
from megatron_lpa.data.storage.dataset_manifest import (
    Checksums,
    Manifest,
    SourceRecord,
    SubsetCount,
    TokenizerRecord,
    write_manifest,
)
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter

VOCAB_SIZE, EOD = 1000, 0
TOKENIZER = TokenizerRecord("tok", "f" * 64, VOCAB_SIZE, EOD)


def random_documents(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    """Documents of ids below ``VOCAB_SIZE``, each ended by ``EOD``."""
    random = np.random.default_rng(seed)
    return [
        [*random.integers(1, VOCAB_SIZE, random.integers(1, longest)).tolist(), EOD] for _ in range(count)
    ]


def manifest_of(
    prefix: Path | str, documents: Sequence[Sequence[int]], block_bytes: int = 1 << 26
) -> Manifest:
    """What preprocessing two equal source files and subsets would have recorded of the files at
    ``prefix``."""
    half = len(documents) // 2
    tokens = [len(document) for document in documents]
    name = Path(prefix).name
    return Manifest(
        documents=len(documents),
        tokens=sum(tokens),
        empty_documents=1,
        dropped_documents=2,
        rejected_documents=3,
        bytes_text=4 * sum(tokens),
        words=sum(tokens) // 2,
        dtype="uint16",
        json_key="text",
        append_eod=True,
        tokenizer=TOKENIZER,
        checksums=Checksums(
            list(block_digests(Path(f"{prefix}.bin"), block_bytes)),
            list(block_digests(Path(f"{prefix}.idx"), block_bytes)),
            block_bytes,
        ),
        sources=[
            SourceRecord(f"{name}.a.jsonl", 10, hashlib.sha256(f"{prefix} a".encode()).hexdigest(), half),
            SourceRecord(
                f"{name}.b.jsonl",
                20,
                hashlib.sha256(f"{prefix} b".encode()).hexdigest(),
                len(documents) - half,
            ),
        ],
        subsets={
            "Pile-CC": SubsetCount(half, sum(tokens[:half])),
            name: SubsetCount(len(documents) - half, sum(tokens[half:])),
        },
    )


def write_dataset(
    prefix: Path,
    documents: Sequence[Sequence[int]],
    dtype: type[np.integer[Any]] = np.uint16,
    manifest: bool = True,
    change: Callable[[Manifest], Manifest] = replace,
    block_bytes: int = 1 << 26,
) -> Path:
    """Writes documents, and a manifest passed through ``change``."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    if manifest:
        record = manifest_of(prefix, documents, block_bytes)
        write_manifest(prefix, change(replace(record, dtype=np.dtype(dtype).name)))
    return prefix
