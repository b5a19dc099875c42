"""From ``data.*`` keys to the train, valid and test samples of a run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.blend import Blend
from megatron_lpa.data.gpt_dataset import DocumentRange, GPTDataset
from megatron_lpa.data.identity import same_files
from megatron_lpa.data.index_cache import Report
from megatron_lpa.data.samples import Samples
from megatron_lpa.data.source import Opening, Source, report_to_stderr
from megatron_lpa.errors import UserError

_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


@dataclass(frozen=True)
class Splits:
    """The samples of a run. ``notes`` says, in sentences for the log, what was left out and why."""

    train: Samples
    valid: Samples | None
    test: Samples | None
    notes: tuple[str, ...] = ()

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Every dataset of the run, once."""
        splits = [split for split in (self.train, self.valid, self.test) if split is not None]
        return tuple(dict.fromkeys(prefix for split in splits for prefix, _, _ in split.parts))


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


def open_splits(
    data: DataConfig, sequence_length: int, seed: int, report: Report = report_to_stderr
) -> Splits:
    """Opens the datasets that ``data`` names, and makes their sample indices where there are none yet.

    Valid and test are ``None`` where their share is empty or their prefix not given. A test share cut by
    ``data.split`` that is shorter than one sample is left out with a note: the usual 0.1 % of a small corpus
    should not stop a run that never asked for a test.

    Args:
        data: what to open.
        sequence_length: S, tokens per sequence.
        seed: of the order of samples.
        report: takes sentences about work that takes its time; by default they go to stderr.

    Raises:
        UserError: no dataset or two kinds are named, a file is missing or damaged, the same data is named for
            training and for something else, a split is too short, or an index cannot be kept anywhere.
    """
    kinds = {
        "data.prefix": data.prefix,
        "data.blend": data.blend,
        "data.train_prefix": data.train_prefix,
    }
    named = [key for key, value in kinds.items() if value is not None]
    if len(named) > 1 or (
        named != ["data.train_prefix"] and named and (data.valid_prefix or data.test_prefix)
    ):
        raise UserError(
            "data.prefix and data.blend are cut into train, valid and test by data.split, so each excludes "
            "the other and data.train_prefix, data.valid_prefix and data.test_prefix; give one kind only"
        )
    opening = Opening(data, sequence_length, seed, report)
    if data.blend is not None:
        return _blended_splits(data.blend, opening)
    if data.prefix is not None:
        return _cut_splits(Source(data.prefix, opening, data.shuffle_documents), opening)
    if data.train_prefix is None:
        raise UserError(
            "no training data: set data.prefix, or data.train_prefix, to what preprocessing wrote"
        )
    train = Source(data.train_prefix, opening, data.shuffle_documents)
    held_out: list[GPTDataset | None] = []
    for name, prefix in (("valid", data.valid_prefix), ("test", data.test_prefix)):
        source = Source(prefix, opening, False) if prefix else None
        if source is not None and _same_data(train, source):
            raise UserError(
                f"data.{name}_prefix {source.prefix} is the training data, data.train_prefix {train.prefix}: "
                f"the same files or the same tokens; give held-out data, or set data.{name}_prefix to null"
            )
        held_out.append(None if source is None else _whole(source, name))
    return Splits(_whole(train, "train"), held_out[0], held_out[1])


def exact_weights(blend: dict[str, float]) -> dict[str, Fraction]:
    """Weights that sum to exactly 1; ``0.3`` means three tenths, not the binary number nearest to it."""
    fractions = {prefix: Fraction(str(weight)) for prefix, weight in blend.items()}
    total = sum(fractions.values())
    return {prefix: weight / total for prefix, weight in fractions.items()}


def _same_data(one: Source, other: Source) -> bool:
    return same_files(one.prefix, other.prefix) or one.identity.same_as(other.identity)


def _whole(source: Source, name: str) -> GPTDataset:
    return source.split((0, source.indexed.num_documents), name)


def _cut_splits(source: Source, opening: Opening) -> Splits:
    split = opening.data.split
    train, valid, test = split_documents(source.indexed.num_documents, split)
    _refuse_no_documents(source, train, split)
    notes: list[str] = []
    test_tokens = source.tokens(test, "test") if test[0] < test[1] else 0
    has_test = test_tokens > opening.sequence_length
    if test[0] < test[1] and not has_test:
        notes.append(
            f"no test split: its share of {source.prefix} ({split!r}) is {test_tokens} tokens, "
            f"fewer than one sample of {opening.sequence_length + 1}"
        )
    has_valid = valid[0] < valid[1]
    if not has_valid:
        notes.append(f"no validation split: its share of {source.prefix} ({split!r}) holds no document")
    return Splits(
        source.split(train, "train"),
        source.split(valid, "valid") if has_valid else None,
        source.split(test, "test") if has_test else None,
        tuple(notes),
    )


def _blended_splits(blend: dict[str, float], opening: Opening) -> Splits:
    """Every dataset cut by itself, and each split blended.

    Datasets are ordered by their contents: neither the order in which a blend is written nor where its files
    lie has a part in the order of samples.
    """
    weights = exact_weights(blend)
    sources = [Source(prefix, opening, opening.data.shuffle_documents) for prefix in weights]
    for one, other in itertools.combinations(sources, 2):
        if _same_data(one, other):
            raise UserError(
                f"data.blend has one dataset twice: {one.prefix} and {other.prefix} are the same files or "
                "the same tokens; leave one out, and give the other the sum of the weights"
            )
    sources.sort(
        key=lambda source: (source.identity.contents, source.identity.checksums or "", source.prefix)
    )
    split = opening.data.split
    ranges = [split_documents(source.indexed.num_documents, split) for source in sources]
    for source, (train, _, _) in zip(sources, ranges, strict=True):
        _refuse_no_documents(source, train, split)
    notes: list[str] = []
    trained = [source.split(cut[0], "train") for source, cut in zip(sources, ranges, strict=True)]
    held_out: list[Blend | None] = []
    for number, name in ((1, "valid"), (2, "test")):
        cuts = [(source, cut[number]) for source, cut in zip(sources, ranges, strict=True)]
        kept = [
            (source, cut)
            for source, cut in cuts
            if cut[0] < cut[1] and source.tokens(cut, name) > opening.sequence_length
        ]
        left_out = [source.prefix for source, cut in cuts if (source, cut) not in kept]
        if left_out and float([*split.split(","), "0", "0"][number]) > 0:
            notes.append(
                f"{'no' if not kept else 'not in the'} {name} split: {', '.join(left_out)}, of which the "
                f"share of documents ({split!r}) is shorter than one sample"
            )
        if not kept:
            held_out.append(None)
            continue
        samples = _blend([source.split(cut, name) for source, cut in kept], weights, name)
        held_out.append(samples)
        if len(samples.parts) > 1:
            prefix, _, held = min(samples.parts, key=lambda part: part[2] / part[1])
            notes.append(
                f"the {name} split reads {samples.num_samples} samples, in the blend's proportions; then "
                f"{prefix} has no more than its {held}"
            )
    return Splits(_blend(trained, weights, "train"), held_out[0], held_out[1], tuple(notes))


def _blend(datasets: Sequence[GPTDataset], weights: dict[str, Fraction], name: str) -> Blend:
    own = [weights[dataset.indexed.prefix] for dataset in datasets]
    return Blend(datasets, [weight / sum(own) for weight in own], name)


def _refuse_no_documents(source: Source, train: DocumentRange, split: str) -> None:
    if train[0] == train[1]:
        raise UserError(
            f"data.split {split!r} leaves none of the {source.indexed.num_documents} documents of "
            f"{source.prefix} for training; give train a larger share"
        )
