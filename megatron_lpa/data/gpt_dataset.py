"""Samples of fixed length cut from the token stream of a dataset's documents."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from megatron_lpa.data.identity import Identity, identity_of
from megatron_lpa.data.index_cache import SampleIndex
from megatron_lpa.data.order import DocumentOrder, permuted
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.errors import UserError

DocumentRange = tuple[int, int]


@dataclass(frozen=True)
class ShuffledDocuments:
    """An order of documents, and where the samples of a range of it begin."""

    order: DocumentOrder
    index: SampleIndex


class PackedDocuments:
    """Samples of shuffled documents.

    Args:
        indexed: the token files.
        order: in which documents are read.
        starts: what ``packing.sample_starts`` returned, for the same sequence length.
        sequence_length: S, tokens per sequence.
    """

    def __init__(
        self, indexed: IndexedDataset, order: DocumentOrder, starts: np.ndarray, sequence_length: int
    ) -> None:
        self._indexed = indexed
        self._order = order
        self._starts = starts
        self._sequence_length = sequence_length

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Samples by index: integers ``(b,)`` to int64 ``(b, S + 1)``.

        Raises:
            UserError: the dataset's files have changed since the index was made.
        """
        length = self._sequence_length + 1
        first = self._starts[samples].astype(np.int64)
        last = self._starts[samples + 1].astype(np.int64)
        counts = last[:, 0] - first[:, 0] + 1
        if counts.min() < 1 or last[:, 0].max() >= self._order.num_documents:
            raise self._changed()
        # All documents of all samples at once: a dozen NumPy calls a batch, not a dozen a sample.
        firsts = np.cumsum(counts) - counts
        positions = np.arange(int(counts.sum())) + np.repeat(first[:, 0] - firsts, counts)
        documents = self._order.at(positions).astype(np.int64)
        offsets = self._indexed.document_offsets(np.concatenate((documents, documents + 1)))
        begins, ends = offsets[: len(documents)].copy(), offsets[len(documents) :].copy()
        lasts = firsts + counts - 1
        ends[lasts] = begins[lasts] + last[:, 1] + 1
        begins[firsts] += first[:, 1]
        if begins.min() < 0 or ends.max() > self._indexed.num_tokens or (ends < begins).any():
            raise self._changed()
        if (np.add.reduceat(ends - begins, firsts) != length).any():
            raise self._changed()
        tokens = np.empty(len(samples) * length, dtype=np.int64)
        filled = 0
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            tokens[filled : filled + end - begin] = self._indexed.tokens(begin, end)
            filled += end - begin
        return tokens.reshape(len(samples), length)

    def _changed(self) -> UserError:
        return UserError(
            f"{self._indexed.prefix}: its documents are not those that its sample index was made of; if the "
            "files were replaced during the run, start again"
        )


class GPTDataset:
    """The documents of a range as one stream of tokens, cut into samples of ``sequence_length`` + 1 ids.

    Sample ``k`` holds tokens ``k * S`` to ``k * S + S`` inclusive: inputs are its first S ids, labels its
    last S, so neighbours share one id and every token but the first is a label exactly once. The end of
    the stream that does not fill a sample is left out.

    Args:
        indexed: the token files.
        document_range: documents ``start`` to ``stop`` of them, or of their shuffled order.
        sequence_length: S, tokens per sequence.
        seed: of the shuffled order of samples.
        name: which split this is, for messages.
        shuffled_documents: the order of documents and the index of this range and S; None for the order of
            the file, which needs no index.

    Raises:
        UserError: the range holds fewer than S + 1 tokens.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        document_range: DocumentRange,
        sequence_length: int,
        seed: int,
        name: str = "dataset",
        shuffled_documents: ShuffledDocuments | None = None,
    ) -> None:
        start, stop = document_range
        assert 0 <= start <= stop <= indexed.num_documents and sequence_length >= 1
        self.indexed = indexed
        self.document_range = document_range
        self.sequence_length = sequence_length
        self.seed = seed
        self.name = name
        self._shuffled_documents = shuffled_documents
        self._packed: PackedDocuments | None = None
        self._first_token = 0
        if shuffled_documents is None:
            self._first_token = indexed.document_offset(start)
            self.num_tokens: int = indexed.document_offset(stop) - self._first_token
        else:
            index = shuffled_documents.index
            self.num_tokens = index.num_tokens
            self._packed = PackedDocuments(indexed, shuffled_documents.order, index.starts, sequence_length)
        self.num_samples: int = max(0, self.num_tokens - 1) // sequence_length
        if self.num_samples == 0:
            raise UserError(
                f"{indexed.prefix}: the {name} documents {start} to {stop} hold {self.num_tokens} tokens, "
                f"fewer than the {sequence_length + 1} of one sample (the sequence length and one more); "
                "use more text, a shorter sequence length, or another data.split"
            )
        assert shuffled_documents is None or len(shuffled_documents.index.starts) == self.num_samples + 1

    @property
    def parts(self) -> tuple[tuple[str, Fraction, int], ...]:
        """The one dataset behind it: prefix, share 1, samples."""
        return ((self.indexed.prefix, Fraction(1), self.num_samples),)

    def giving(self, num_samples: int) -> list[tuple[GPTDataset, int]]:
        """Itself, which gives all of the first ``num_samples`` of the plain order."""
        return [(self, num_samples)]

    @cached_property
    def identity(self) -> Identity:
        """What the files held when this was first asked."""
        return identity_of(self.indexed.prefix)

    def sample(self, index: int) -> np.ndarray:
        """Sample ``index`` of the stream: int64 ``(S + 1,)``."""
        return self.read(np.array([index], dtype=np.int64))[0]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Samples of the stream by index: int64 ``(b,)`` to int64 ``(b, S + 1)``."""
        for index in indices.tolist():
            if not 0 <= index < self.num_samples:
                raise IndexError(f"sample {index} of {self.num_samples} in {self.indexed.prefix}")
        if self._packed is not None:
            return self._packed.read(indices)
        length = self.sequence_length
        begins = self._first_token + indices * length
        pieces = [self.indexed.tokens(begin, begin + length + 1) for begin in begins.tolist()]
        return np.stack(pieces).astype(np.int64)

    def shuffled(self, positions: np.ndarray) -> np.ndarray:
        """Which sample each position of the endless shuffled order is: int64 ``(n,)`` to int64 ``(n,)``.

        Position ``i`` belongs to epoch ``i // num_samples``; each epoch holds every sample once, in an order
        that is a function of the seed and the epoch only (see ``order.py``).
        """
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        return permuted(places, self.num_samples, self.seed, epochs)

    def in_order(self, positions: np.ndarray) -> np.ndarray:
        """Samples in the order of the stream: the positions themselves, int64 ``(n,)``."""
        return positions

    def origin(self, index: int) -> str:
        """Where a sample comes from, in words for a message."""
        return f"{self.indexed.prefix}: sample {index} of {self.name}"

    def facts(self) -> dict[str, Any]:
        """All that the orders depend on besides the seed, as JSON; paths and dates have no part in it."""
        start, stop = self.document_range
        order = None if self._shuffled_documents is None else self._shuffled_documents.order
        return {
            "sequence_length": self.sequence_length,
            "document_seed": None if order is None else order.seed,
            "documents": f"{start} to {stop} of {self.indexed.num_documents}",
            "tokens": self.indexed.num_tokens,
            "contents": self.identity.contents,
            "checksums": self.identity.checksums,
        }
