"""What a token dataset holds: counts, lengths of documents, and shares of subsets and source files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lpa.data.storage.dataset_manifest import Manifest, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset, bin_path, idx_path
from megatron_lpa.files import from_disk

_BLOCK = 1 << 20  # documents in memory at a time
# Documents up to this length are counted by length, longer ones are listed: both stay small, and exact.
_COUNTED_TOKENS = 1 << 20


@dataclass(frozen=True)
class LengthBucket:
    """The documents of ``low`` to ``high`` tokens, both included, and their tokens together."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class LengthStatistics:
    """Tokens per document. Median and 99th percentile are interpolated as NumPy does by default.

    ``buckets`` goes in powers of two from the shortest document to the longest, without gaps.
    """

    minimum: int
    median: float
    mean: float
    p99: float
    maximum: int
    buckets: list[LengthBucket]


@dataclass(frozen=True)
class Part:
    """A subset or a source file. ``tokens`` is ``None`` where the records do not tell."""

    name: str
    documents: int
    tokens: int | None
    size_bytes: int | None = None


@dataclass(frozen=True)
class Summary:
    """All that the index and the manifest of a dataset tell. ``manifest`` is ``None`` where there is none."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    bin_bytes: int
    idx_bytes: int
    lengths: LengthStatistics
    subsets: list[Part]
    sources: list[Part]
    manifest: Manifest | None


class LengthCounter:
    """Counts lengths of documents exactly, in memory that does not grow with the number of documents."""

    def __init__(self) -> None:
        self._counts = np.zeros(_COUNTED_TOKENS, dtype=np.int64)
        self._long: list[np.ndarray] = []

    def add(self, lengths: np.ndarray) -> None:
        """Counts int64 lengths ``(documents,)``."""
        short = lengths[lengths < _COUNTED_TOKENS]
        self._counts += np.bincount(short, minlength=_COUNTED_TOKENS)
        if len(short) < len(lengths):
            self._long.append(lengths[lengths >= _COUNTED_TOKENS])

    def statistics(self) -> LengthStatistics:
        """The statistics of all lengths so far, of which there has to be at least one."""
        values = np.flatnonzero(self._counts)
        counts = self._counts[values]
        if self._long:
            long_values, long_counts = np.unique(np.concatenate(self._long), return_counts=True)
            values = np.concatenate([values, long_values])
            counts = np.concatenate([counts, long_counts])
        return LengthStatistics(
            minimum=int(values[0]),
            median=_percentile(values, counts, 50),
            mean=int((values * counts).sum()) / int(counts.sum()),
            p99=_percentile(values, counts, 99),
            maximum=int(values[-1]),
            buckets=_buckets(values, counts),
        )


def _percentile(values: np.ndarray, counts: np.ndarray, percent: int) -> float:
    """Of ``counts[i]`` times ``values[i]``, sorted: linear interpolation between the two nearest."""
    last_of = np.cumsum(counts)
    position, hundredths = divmod((int(last_of[-1]) - 1) * percent, 100)
    low = int(values[np.searchsorted(last_of, position, side="right")])
    if not hundredths:
        return float(low)
    high = int(values[np.searchsorted(last_of, position + 1, side="right")])
    return low + (high - low) * hundredths / 100


def _buckets(values: np.ndarray, counts: np.ndarray) -> list[LengthBucket]:
    exponents = np.frexp(values.astype(np.float64))[1]  # 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, ...
    buckets = []
    for exponent in range(int(exponents[0]), int(exponents[-1]) + 1):
        inside = exponents == exponent
        low, high = (1 << exponent) >> 1, (1 << exponent) - 1
        tokens = (values[inside] * counts[inside]).sum()
        buckets.append(LengthBucket(low, high, int(counts[inside].sum()), int(tokens)))
    return buckets


def summarize(prefix: str) -> Summary:
    """Reads the whole index, in blocks, and the manifest, but no token.

    Raises:
        UserError: a file is missing or damaged.
    """
    dataset, manifest = IndexedDataset(prefix), read_manifest(prefix)
    counter = LengthCounter()
    for start in range(0, dataset.num_documents, _BLOCK):
        counter.add(dataset.document_sizes(start, min(start + _BLOCK, dataset.num_documents)))
    return Summary(
        prefix=prefix,
        documents=dataset.num_documents,
        sequences=dataset.num_sequences,
        tokens=dataset.num_tokens,
        dtype=dataset.dtype.name,
        bin_bytes=from_disk(bin_path(prefix).stat, prefix).st_size,
        idx_bytes=from_disk(idx_path(prefix).stat, prefix).st_size,
        lengths=counter.statistics(),
        subsets=_subsets(manifest) if manifest else [],
        sources=_sources(dataset, manifest) if manifest else [],
        manifest=manifest,
    )


def _subsets(manifest: Manifest) -> list[Part]:
    parts = [Part(name, count.documents, count.tokens) for name, count in manifest.subsets.items()]
    return sorted(parts, key=lambda part: (-(part.tokens or 0), part.name))


def _sources(dataset: IndexedDataset, manifest: Manifest) -> list[Part]:
    """Source files in order. Documents lie in that order, so the counts of documents tell the tokens."""
    ends: Sequence[int] = np.cumsum([0, *(source.documents for source in manifest.sources)]).tolist()
    known = ends[-1] == dataset.num_documents and all(source.documents >= 0 for source in manifest.sources)
    parts = []
    for source, start, stop in zip(manifest.sources, ends[:-1], ends[1:], strict=True):
        tokens = dataset.document_offset(stop) - dataset.document_offset(start) if known else None
        parts.append(Part(source.path, source.documents, tokens, source.size_bytes))
    return parts
