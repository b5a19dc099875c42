"""Samples of fixed length cut from the token stream of documents; the split into train, valid and test."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.indexed import IndexedDataset
from megatron_lpa.data.permutation import permuted
from megatron_lpa.errors import UserError

DocumentRange = tuple[int, int]
_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


def split_documents(num_documents: int, split: str) -> tuple[DocumentRange, DocumentRange, DocumentRange]:
    """Cuts ``range(num_documents)`` into train, valid and test ranges ``(start, stop)`` of whole documents.

    The shares lie one after the other and are rounded as Megatron rounds them; missing shares are 0.

    Args:
        num_documents: documents to share out.
        split: up to three non-negative weights, as ``"969,30,1"``.

    Raises:
        UserError: ``split`` is not such a list, or all its weights are 0.
    """
    fields = [field.strip() for field in split.split(",")]
    if len(fields) > 3 or not all(_NUMBER.fullmatch(field) for field in fields):
        raise UserError(
            f"data.split is {split!r}; give one to three non-negative weights for train, valid and test, "
            'as "969,30,1"'
        )
    weights = [float(field) for field in fields] + [0.0] * (3 - len(fields))
    total = sum(weights)
    if total <= 0:
        raise UserError(f"data.split is {split!r}; at least one weight has to be above 0")
    bounds, share = [0], 0.0
    for weight in weights:
        share += weight / total
        bounds.append(round(share * num_documents))
    return (bounds[0], bounds[1]), (bounds[1], bounds[2]), (bounds[2], bounds[3])


class GPTDataset:
    """The documents of a range as one stream of tokens, cut into samples of ``sequence_length`` + 1 ids.

    Sample ``k`` holds tokens ``k * S`` to ``k * S + S`` inclusive: inputs are its first S ids, labels its
    last S, so neighbours share one id and every token but the first is a label exactly once. The end of
    the stream that does not fill a sample is left out.

    Args:
        indexed: the token files.
        document_range: documents ``start`` to ``stop`` of them.
        sequence_length: S, tokens per sequence.
        seed: of the shuffled order.
        name: which split this is, for messages.

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
    ) -> None:
        start, stop = document_range
        assert 0 <= start <= stop <= indexed.num_documents and sequence_length >= 1
        self.indexed = indexed
        self.document_range = document_range
        self.sequence_length = sequence_length
        self.seed = seed
        self.name = name
        self._first_token = indexed.document_offset(start)
        self.num_tokens: int = indexed.document_offset(stop) - self._first_token
        self.num_samples: int = max(0, self.num_tokens - 1) // sequence_length
        if self.num_samples == 0:
            raise UserError(
                f"{indexed.prefix}: the {name} documents {start} to {stop} hold {self.num_tokens} tokens, "
                f"fewer than the {sequence_length + 1} of one sample (the sequence length and one more); "
                "use more text, a shorter sequence length, or another data.split"
            )

    def sample(self, index: int) -> np.ndarray:
        """Sample ``index`` in the order of the text: int64 ``(S + 1,)``."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples} in {self.indexed.prefix}")
        start = self._first_token + index * self.sequence_length
        return self.indexed.tokens(start, start + self.sequence_length + 1).astype(np.int64)

    def shuffled(self, global_indices: np.ndarray) -> np.ndarray:
        """Which sample each position of the endless shuffled order is: int64 ``(n,)`` to int64 ``(n,)``.

        Position ``i`` belongs to epoch ``i // num_samples``; each epoch holds every sample once, in an order
        that is a function of the seed and the epoch only (see ``permutation.py``).
        """
        global_indices = np.asarray(global_indices, dtype=np.int64)
        epochs, positions = np.divmod(global_indices, self.num_samples)
        return permuted(positions, self.num_samples, self.seed, epochs)


@dataclass(frozen=True)
class Splits:
    """The datasets of a run. ``notes`` says, in sentences for the log, what was left out and why."""

    train: GPTDataset
    valid: GPTDataset | None
    test: GPTDataset | None
    notes: tuple[str, ...] = ()


def open_splits(data: DataConfig, sequence_length: int, seed: int) -> Splits:
    """Opens the datasets that ``data`` names.

    Valid and test are ``None`` where their share is empty or their prefix not given. A test share cut by
    ``data.split`` that is shorter than one sample is left out with a note: the usual 0.1 % of a small corpus
    should not stop a run that never asked for a test.

    Raises:
        UserError: no dataset or two kinds are named, a file is missing or damaged, or a split is too short.
    """
    if data.prefix is not None:
        if any((data.train_prefix, data.valid_prefix, data.test_prefix)):
            raise UserError(
                "data.prefix is cut into train, valid and test by data.split, so it excludes "
                "data.train_prefix, data.valid_prefix and data.test_prefix; give one kind only"
            )
        return _cut_splits(IndexedDataset(data.prefix), data.split, sequence_length, seed)
    if data.train_prefix is None:
        raise UserError(
            "no training data: set data.prefix, or data.train_prefix, to what preprocessing wrote"
        )
    return Splits(
        _whole(data.train_prefix, sequence_length, seed, "train"),
        _whole(data.valid_prefix, sequence_length, seed, "valid") if data.valid_prefix else None,
        _whole(data.test_prefix, sequence_length, seed, "test") if data.test_prefix else None,
    )


def _whole(prefix: str, sequence_length: int, seed: int, name: str) -> GPTDataset:
    indexed = IndexedDataset(prefix)
    return GPTDataset(indexed, (0, indexed.num_documents), sequence_length, seed, name)


def _cut_splits(indexed: IndexedDataset, split: str, sequence_length: int, seed: int) -> Splits:
    train, valid, test = split_documents(indexed.num_documents, split)
    if train[0] == train[1]:
        raise UserError(
            f"data.split {split!r} leaves none of the {indexed.num_documents} documents of {indexed.prefix} "
            "for training; give train a larger share"
        )
    notes: list[str] = []
    test_tokens = indexed.document_offset(test[1]) - indexed.document_offset(test[0])
    has_test = test_tokens > sequence_length
    if test[0] < test[1] and not has_test:
        notes.append(
            f"no test split: its share of {indexed.prefix} ({split!r}) is {test_tokens} tokens, "
            f"fewer than one sample of {sequence_length + 1}"
        )
    has_valid = valid[0] < valid[1]
    if not has_valid:
        notes.append(f"no validation split: its share of {indexed.prefix} ({split!r}) holds no document")
    return Splits(
        GPTDataset(indexed, train, sequence_length, seed, "train"),
        GPTDataset(indexed, valid, sequence_length, seed, "valid") if has_valid else None,
        GPTDataset(indexed, test, sequence_length, seed, "test") if has_test else None,
        tuple(notes),
    )
