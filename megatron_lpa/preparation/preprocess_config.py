"""The options of preprocessing, and the names of what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_lpa.data.storage.dataset_manifest import why_unfit
from megatron_lpa.data.storage.indexed import check_output_prefix
from megatron_lpa.errors import UserError, shown
from megatron_lpa.preparation.documents import PILE_SUBSET, Selection


@dataclass(frozen=True)
class PreprocessConfig:
    """What to tokenize.

    Args:
        output_prefix: outputs are ``<output_prefix>_<key>_document.{bin,idx,json}``.
        tokenizer: what :func:`load_tokenizer` takes.
        inputs: files, folders and glob patterns; see ``sources.py``.
        dataset: instead of ``inputs``, a dataset for the package ``datasets``: a hub name or a folder.
        dataset_config: its configuration, where it has several.
        dataset_split: its split.
        json_keys: keys to tokenize, each into its own dataset.
        append_eod: end every document with the tokenizer's end-of-document token.
        engine: ``auto`` uses the fast engine where its ids are the reference's; ``reference`` never.
        subset_key: where records name their subset, keys joined by dots.
        keep_subsets: keep only records of these; empty keeps all.
        drop_subsets: leave out records of these.
        on_bad_line: ``error`` stops at a bad record; ``skip`` writes it to the reject file and goes on.
        shard: (i, n) does the i-th of n parts of the input files, from 0.
        workers: processes that tokenize; the output does not depend on it.
        log_interval: documents between progress lines; 0 prints none.
        commit_interval_s: seconds between entries of the ledger; a kill costs at most that much work.
        overwrite: replace existing outputs.
        restart: discard what an unfinished run left.
    """

    output_prefix: str
    tokenizer: str
    inputs: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    engine: Literal["auto", "reference"] = "auto"
    subset_key: str = PILE_SUBSET
    keep_subsets: tuple[str, ...] = ()
    drop_subsets: tuple[str, ...] = ()
    on_bad_line: Literal["error", "skip"] = "error"
    shard: tuple[int, int] | None = None
    workers: int = 1
    log_interval: int = 10_000
    commit_interval_s: float = 10.0
    overwrite: bool = False
    restart: bool = False

    @property
    def prefix(self) -> str:
        """``output_prefix``, with the number of the shard."""
        if self.shard is None:
            return self.output_prefix
        return f"{self.output_prefix}.shard-{self.shard[0]:05d}-of-{self.shard[1]:05d}"

    @property
    def selection(self) -> Selection:
        return Selection(self.json_keys, self.subset_key, self.keep_subsets, self.drop_subsets)


def output_prefix(prefix: str, key: str) -> str:
    """Megatron's name for the dataset of one key."""
    return f"{prefix}_{key}_document"


def reject_path(prefix: str) -> Path:
    """Where the bad records of a run go, as JSON lines."""
    return Path(f"{prefix}.rejected.jsonl")


def check_options(config: PreprocessConfig) -> None:
    """Refuses options that cannot work.

    Raises:
        UserError: which one, and what to give instead.
    """
    if config.workers < 1:
        raise UserError(f"--workers is {config.workers}; give 1 or more")
    if not 0 < config.commit_interval_s < float("inf"):
        raise UserError(f"--commit-interval is {config.commit_interval_s}; give seconds above 0")
    if config.log_interval < 0:
        raise UserError(f"--log-interval is {config.log_interval}; give 0 or more")
    check_output_prefix(config.output_prefix, "--output-prefix")
    if not config.json_keys or len(set(config.json_keys)) != len(config.json_keys):
        raise UserError(f"--json-keys is {' '.join(config.json_keys)!r}; give one or more different keys")
    for key in config.json_keys:
        if "/" in key or "\0" in key or not key:
            raise UserError(f"--json-keys: {key!r} cannot be part of a file name; rename the key")
    for option, values in (
        ("--tokenizer", [config.tokenizer]),
        ("--dataset", [config.dataset or ""]),
        ("--dataset-config", [config.dataset_config or ""]),
        ("--dataset-split", [config.dataset_split]),
        ("--json-keys", config.json_keys),
        ("--keep-subsets", config.keep_subsets),
        ("--drop-subsets", config.drop_subsets),
    ):
        for value in values:
            if reason := why_unfit(value):
                raise UserError(f"{option} is {shown(value)}, {reason}; give another name")
    both = set(config.keep_subsets) & set(config.drop_subsets)
    if both:
        raise UserError(f"subset {sorted(both)[0]!r} is both to be kept and to be dropped; name it once")
