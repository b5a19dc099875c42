"""One dataset as a run opens it: its order of documents, and its sample indices, kept on disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.gpt_dataset import DocumentRange, GPTDataset, ShuffledDocuments
from megatron_lpa.data.identity import Identity, identity_of, index_state
from megatron_lpa.data.index_cache import IndexCache, Report, SampleIndex, default_folders
from megatron_lpa.data.order import DocumentOrder
from megatron_lpa.data.packing import check_document_count, read_document_sizes, sample_starts
from megatron_lpa.data.storage.indexed import IndexedDataset

logger = logging.getLogger(__name__)

_QUICK_DOCUMENTS = 1 << 20  # the files of so many are checked in milliseconds, so nothing about it is kept
_SLOW_DOCUMENTS = 10_000_000


def report_to_stderr(sentence: str) -> None:
    """Prints a sentence about work that takes its time."""
    logger.info(f"note: {sentence}")


@dataclass(frozen=True)
class Opening:
    """What all datasets of a run are opened with.

    Args:
        data: where they are, and how their documents are ordered.
        sequence_length: S, tokens per sequence.
        seed: of the order of samples.
        report: takes sentences about work that takes its time.
    """

    data: DataConfig
    sequence_length: int
    seed: int
    report: Report = report_to_stderr


class Source:
    """One dataset, opened once for all splits that are cut from it.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        opening: what it is opened with.
        shuffle: whether documents are shuffled before they are cut into splits and packed into samples.

    Raises:
        UserError: a file is missing or damaged, or it holds too many documents to shuffle.
    """

    def __init__(self, prefix: str, opening: Opening, shuffle: bool) -> None:
        self.prefix = prefix
        self._opening = opening
        # Sequences and documents are checked when an index is made; this looks at headers and sizes only.
        self.indexed = IndexedDataset(prefix, check=False)
        if shuffle:
            check_document_count(self.indexed)
        self._order = (
            DocumentOrder(self.indexed.num_documents, opening.data.document_seed) if shuffle else None
        )
        folders = [Path(opening.data.cache_dir)] if opening.data.cache_dir else default_folders(prefix)
        self._cache = IndexCache(folders, opening.data.index_timeout_s, opening.report)
        self._sizes: np.ndarray | None = None
        self._indices: dict[DocumentRange, SampleIndex] = {}
        if not shuffle:
            self._check_once()

    @cached_property
    def identity(self) -> Identity:
        """What the files hold."""
        return identity_of(self.prefix)

    def tokens(self, documents: DocumentRange, name: str) -> int:
        """Tokens of a range of documents."""
        if self._order is not None:
            return self._index(documents, name).num_tokens
        return self.indexed.document_offset(documents[1]) - self.indexed.document_offset(documents[0])

    def split(self, documents: DocumentRange, name: str) -> GPTDataset:
        """Samples of a range of documents.

        Raises:
            UserError: it holds fewer tokens than one sample.
        """
        shuffled = None
        if self._order is not None:
            shuffled = ShuffledDocuments(self._order, self._index(documents, name))
        opening = self._opening
        return GPTDataset(self.indexed, documents, opening.sequence_length, opening.seed, name, shuffled)

    def _index(self, documents: DocumentRange, name: str) -> SampleIndex:
        if documents not in self._indices:
            assert self._order is not None
            sequence_length = self._opening.sequence_length
            start, stop = documents
            key = f"{index_state(self.prefix)} {sequence_length} {self._order.seed} {start} {stop}"
            self._indices[documents] = self._cache.get(
                f"{Path(self.prefix).name}-{name}", key, lambda: self._make_index(documents)
            )
        return self._indices[documents]

    def _make_index(self, documents: DocumentRange) -> SampleIndex:
        assert self._order is not None
        if self._sizes is None:
            if self.indexed.num_documents >= _SLOW_DOCUMENTS:
                self._opening.report(
                    f"{self.prefix}: indexing {self.indexed.num_documents:,} documents; later starts skip "
                    "this"
                )
            IndexedDataset(self.prefix)
            self._sizes = read_document_sizes(self.indexed)
        starts, num_tokens = sample_starts(self._sizes, self._order, documents, self._opening.sequence_length)
        return SampleIndex(starts, num_tokens)

    def _check_once(self) -> None:
        def check() -> SampleIndex:
            IndexedDataset(self.prefix)
            return SampleIndex(np.empty((0, 2), dtype=np.uint32), self.indexed.num_tokens)

        if self.indexed.num_documents < _QUICK_DOCUMENTS:
            check()
        else:
            self._cache.get(f"{Path(self.prefix).name}-checked", f"{index_state(self.prefix)} checked", check)
