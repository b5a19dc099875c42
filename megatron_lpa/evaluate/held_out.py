"""Which token ids a run may be judged by: its held-out documents, or other data of its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_lpa.config.compare import differences
from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.gpt_dataset import GPTDataset
from megatron_lpa.data.identity import identity_of, same_files
from megatron_lpa.data.samples import Samples
from megatron_lpa.data.splits import Splits, open_splits
from megatron_lpa.data.storage.dataset_manifest import manifest_path, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.tokenizers.opening import load_tokenizer
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.evaluate.trained import RecordedRun, found_again
from megatron_lpa.files import is_dir
from megatron_lpa.run_folder import CONFIG, TOKENIZER


@dataclass(frozen=True)
class DatasetTokens:
    """All tokens of a dataset in the order of the file, read where they are asked for."""

    dataset: IndexedDataset

    def __len__(self) -> int:
        return self.dataset.num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        return self.dataset.tokens(start, max(start, stop))


@dataclass(frozen=True)
class SplitTokens:
    """The tokens of the first ``num_samples`` samples of a split in plain order, read where they are asked
    for."""

    dataset: GPTDataset
    num_samples: int

    def __len__(self) -> int:
        return self.num_samples * self.dataset.sequence_length + 1

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        if stop <= start:
            return np.empty(0, dtype=np.int64)
        length = self.dataset.sequence_length
        # Neighbours share an id: a sample ends with the first one of the next.
        first = min(start // length, self.num_samples - 1)
        rows = self.dataset.read(np.arange(first, max(first + 1, -(-(stop - 1) // length))))
        ids = np.append(rows[:, :-1].ravel(), rows[-1, -1])
        return ids[start - first * length : stop - first * length]


def split_streams(run: RecordedRun, name: str, max_tokens: int | None = None) -> list[SplitTokens]:
    """The ids of a split of the run's own data, as the training loop reads it.

    Args:
        run: the run; its configuration says where the data is and how it is cut.
        name: valid or test.
        max_tokens: a little more than so many tokens are enough.

    Returns:
        one stream per dataset: documents one after the other, in the split's order. The datasets of a blend
        give as many samples as the blend reads of each.

    Raises:
        UserError: the data is gone or has changed, or the run has no such split.
    """
    splits = open_splits(data_of(run), run.config.model.sequence_length, run.config.train.seed)
    _refuse_other_data(run, splits)
    split: Samples | None = getattr(splits, name)
    if split is None:
        why = "; ".join(note for note in splits.notes if f"no {name}" in note)
        raise UserError(
            f"the run {run.folder} has no {name} split{f': {why}' if why else ''}; give the other split, or "
            "--data"
        )
    for prefix, _, _ in split.parts:
        check_tokenizer(run, prefix)
    num_samples = split.num_samples
    if max_tokens is not None:
        num_samples = min(num_samples, -(-max_tokens // split.sequence_length))
    return [SplitTokens(dataset, count) for dataset, count in split.giving(num_samples) if count]


def check_tokenizer(run: RecordedRun, prefix: str) -> list[str]:
    """Compares what made a dataset with the run's tokenizer; warnings where that is not known.

    Raises:
        UserError: the dataset was made with another tokenizer: its ids would mean other text.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return [f"{prefix} has no manifest: whether its ids are of the run's tokenizer is not known"]
    known = fingerprint_of(run)
    if known is None:
        return [
            f"{run.folder} records no tokenizer: whether the ids of {prefix} are of the run's is not known"
        ]
    fingerprint, source = known
    if manifest.tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{manifest_path(prefix)}: made with the tokenizer {manifest.tokenizer.name} "
            f"({manifest.tokenizer.fingerprint[:16]}), but the run's, {source}, is {fingerprint[:16]}; the "
            "same id means different text: preprocess the text with the run's tokenizer"
        )
    return []


def training_warnings(run: RecordedRun, prefix: str) -> list[str]:
    """A warning if a dataset, or a copy of it, is what the run was trained on."""
    for key, recorded in _training_prefixes(run.config.data):
        own = found_again(recorded, run.config, run.folder, ".idx")
        if not (own == prefix or same_files(own, prefix) or _same_tokens(own, prefix)):
            continue
        cut = run.config.data.train_prefix is None
        held_out = (
            ", but for what data.split holds out; --split valid and --split test read only that"
            if cut
            else ""
        )
        return [f"{prefix} is the run's {key}: the model was trained on these documents{held_out}"]
    return []


def _same_tokens(one: str, other: str) -> bool:
    try:
        return identity_of(one).same_as(identity_of(other))
    except TryAgain:
        raise
    except UserError:  # the run's data is no longer there
        return False


def _training_prefixes(data: DataConfig) -> Sequence[tuple[str, str]]:
    single = (("data.prefix", data.prefix), ("data.train_prefix", data.train_prefix))
    named = [(key, prefix) for key, prefix in single if prefix is not None]
    return [*named, *(("data.blend", prefix) for prefix in data.blend or {})]


def data_of(run: RecordedRun) -> DataConfig:
    """``data.*`` with paths that lead to the data from here."""

    def found(prefix: str | None) -> str | None:
        return None if prefix is None else found_again(prefix, run.config, run.folder, ".idx")

    data = run.config.data
    blend = data.blend
    if blend is not None:
        blend = {
            found_again(prefix, run.config, run.folder, ".idx"): weight for prefix, weight in blend.items()
        }
    return replace(
        data,
        prefix=found(data.prefix),
        blend=blend,
        train_prefix=found(data.train_prefix),
        valid_prefix=found(data.valid_prefix),
        test_prefix=found(data.test_prefix),
        cache_dir=data.cache_dir and found_again(data.cache_dir, run.config, run.folder),
    )


def _refuse_other_data(run: RecordedRun, splits: Splits) -> None:
    """A cut of other data would hold out other documents, perhaps ones that the model was trained on."""
    saved = run.manifest.get("order", {}).get("data")
    if run.config.data.train_prefix is not None or not saved:
        return
    differing = differences(saved, splits.train.facts(), "data")
    if differing:
        raise UserError(
            f"the data of {run.folder / CONFIG} is not what the run was trained on: {'; '.join(differing)}; "
            "its held-out documents cannot be told: put the data back, or give other data with --data"
        )


def fingerprint_of(run: RecordedRun) -> tuple[str, str] | None:
    """The fingerprint of the run's tokenizer, and where it is known from."""
    copy = run.folder / TOKENIZER
    if is_dir(copy):
        return load_tokenizer(str(copy)).fingerprint, str(copy)
    for _, recorded in _training_prefixes(run.config.data):
        own = found_again(recorded, run.config, run.folder, ".idx")
        manifest = read_manifest(own)
        if manifest is not None:
            return manifest.tokenizer.fingerprint, str(manifest_path(own))
    if run.tokenizer is not None:
        return run.tokenizer.fingerprint, run.tokenizer.name
    return None
