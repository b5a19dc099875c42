"""The data of a run: opened, long enough, and of the model's tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from megatron_lpa.config import DataConfig, RunConfig
from megatron_lpa.data.samples import Samples
from megatron_lpa.data.splits import Splits, open_splits
from megatron_lpa.data.storage.dataset_manifest import manifest_path, read_manifest
from megatron_lpa.data.storage.indexed import bin_path
from megatron_lpa.data.tokenizers.opening import Tokenizer, load_tokenizer
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import exists
from megatron_lpa.train.schedule import total_steps


def open_data(config: RunConfig, most_s: float = math.inf) -> Splits:
    """The splits of a run, with notes on what will be read how often.

    Args:
        config: of the run.
        most_s: seconds to wait for a sample index that another process makes, if less than
            ``data.index_timeout_s``.

    Raises:
        UserError: missing or damaged data, data of another tokenizer, or fewer tokens than ``train.tokens``.
        TryAgain: the disk does not give a file.
    """
    # First, because it takes no time; a sample index can take minutes.
    notes = _check_manifests(_prefixes(config.data), config.model.vocab_size)
    data = replace(config.data, index_timeout_s=min(config.data.index_timeout_s, most_s))
    splits = open_splits(data, config.model.sequence_length, config.train.seed)
    steps = total_steps(config.train, config.model, splits.train.num_samples)
    samples = steps * config.train.global_batch_size
    if config.train.tokens is not None and not config.data.allow_repeats:
        _refuse_repeats(config.train.tokens, steps, config.train.global_batch_size, splits.train)
    return replace(splits, notes=(*splits.notes, *notes, *_reading_notes(samples, splits.train)))


def check_tokenizer(tokenizer: Tokenizer, splits: Splits, config: RunConfig) -> None:
    """Compare ``data.tokenizer`` with the model and with what made the data.

    Raises:
        UserError: it has more ids than the model, or it is not the tokenizer of a dataset.
    """
    given = f"data.tokenizer={config.data.tokenizer}"
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{given} has {tokenizer.vocab_size} ids, but model.vocab_size is {config.model.vocab_size}; "
            f"pass --model.vocab_size {tokenizer.vocab_size}"
        )
    for prefix in splits.prefixes:
        manifest = read_manifest(prefix)
        if manifest is not None and manifest.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{given} has the fingerprint {tokenizer.fingerprint[:16]}, but {manifest_path(prefix)} says "
                f"that this data was made with {manifest.tokenizer.name}, "
                f"{manifest.tokenizer.fingerprint[:16]}; give the tokenizer that the data was made with, or "
                "preprocess the data with this one"
            )


def check_own_tokenizer(tokenizer: Tokenizer, kept: Path, config: RunConfig) -> None:
    """Compare ``data.tokenizer`` with the one that the run was started with.

    Args:
        tokenizer: that of ``data.tokenizer``.
        kept: the copy in the run folder. Where there is none, or none that can be read, nothing is compared.
        config: of the run.

    Raises:
        UserError: another tokenizer: what the model has learned would be read as other text.
        TryAgain: the disk does not give a file.
    """
    if not exists(kept):
        return
    try:
        own = load_tokenizer(str(kept))
    except TryAgain:
        raise
    except UserError:
        return
    if own.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} has the fingerprint {tokenizer.fingerprint[:16]}, but "
            f"this run was started with {own.fingerprint[:16]} ({kept}); give that one, or start a new run "
            "under another logging.name"
        )


def _prefixes(data: DataConfig) -> list[str]:
    named = (data.prefix, *(data.blend or ()), data.train_prefix, data.valid_prefix, data.test_prefix)
    return [prefix for prefix in named if prefix is not None]


def _check_manifests(prefixes: Sequence[str], vocab_size: int) -> list[str]:
    """One tokenizer and one way to end documents for all data, with no more ids than the model.

    Data without a manifest was written by another tool: the ids of each batch are checked, and a note says
    that nothing else is.
    """
    notes: list[str] = []
    first: tuple[str, str] | None = None
    first_ends: tuple[str | None, str] | None = None
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        if manifest is None:
            if not exists(bin_path(prefix)):
                continue  # no such data: opening it says so
            notes.append(
                f"{prefix} has no manifest ({manifest_path(prefix).name}), so which tokenizer made it is not "
                "known: only the range of its ids is checked"
            )
            continue
        path, tokenizer = manifest_path(prefix), manifest.tokenizer
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{path}: the tokenizer of this data has {tokenizer.vocab_size} ids, but model.vocab_size is "
                f"{vocab_size}; pass --model.vocab_size {tokenizer.vocab_size}, or preprocess with the "
                "model's tokenizer"
            )
        described = f"{tokenizer.name} ({tokenizer.fingerprint[:16]})"
        if first is not None and first[0] != tokenizer.fingerprint:
            raise UserError(
                f"{path}: made with the tokenizer {described}, but {first[1]}; the same id would mean "
                "different text: preprocess one of them again with the other's tokenizer"
            )
        first = first or (tokenizer.fingerprint, f"{path} with {described}")
        ends = f"end-of-document token {tokenizer.eod_id}" if manifest.append_eod else None
        if first_ends is not None and first_ends[0] != ends:
            raise UserError(
                f"{path}: its documents end with {ends or 'no end-of-document token'}, but those of "
                f"{first_ends[1]} with {first_ends[0] or 'none'}; preprocess one of them again, with the "
                "other's tokenizer and --append-eod for both or for neither"
            )
        first_ends = first_ends or (ends, str(path))
    return notes


def _refuse_repeats(tokens: int, steps: int, batch: int, train: Samples) -> None:
    """Raise where ``steps`` batches of ``batch`` samples are more than some dataset holds of its share."""
    samples = steps * batch
    length = train.sequence_length
    short = [
        f"{prefix}{_share(weight)}: {needed * length:,} needed, {held * length:,} there, "
        f"{(needed - held) * length:,} short"
        for prefix, weight, held in train.parts
        if (needed := _ceil(samples * weight)) > held
    ]
    if short:
        # Whole steps only: a token more than these would take another batch.
        most = train.num_samples // batch * batch * length
        lower = (
            f"Lower train.tokens to {most:,}"
            if most
            else f"There are only {train.num_samples:,} samples to read, less than the {batch:,} of one step: "  # noqa: E501
            "no value of train.tokens will do; lower train.global_batch_size"
        )
        raise UserError(
            f"train.tokens is {tokens:,}, but the training data has too few tokens to be read once: "
            f"{'; '.join(short)}. {lower}, add data, or set data.allow_repeats to true to read it more than "
            "once"
        )


def _reading_notes(samples: int, train: Samples) -> list[str]:
    """What is read more than once, and how a blend is read."""
    parts = train.parts
    epochs = [float(samples * weight / held) for _, weight, held in parts]
    if len(parts) == 1:
        prefix = parts[0][0]
        return [f"the run reads {prefix} {_times(epochs[0])}"] if samples > parts[0][2] else []
    described = [
        f"{prefix}{_share(weight)} {_times(times)}"
        for (prefix, weight, _), times in zip(parts, epochs, strict=True)
    ]
    return [f"the run reads {', '.join(described)}"]


def _share(weight: Fraction) -> str:
    return "" if weight == 1 else f" ({100 * float(weight):.4g} % of the samples)"


def _times(epochs: float) -> str:
    return f"{epochs:.3g} times"


def _ceil(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)
