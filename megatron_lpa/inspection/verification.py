"""Everything that can be checked of a token dataset without the text it was made from."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lpa.data.storage.block_check import check_checksums, wrong_blocks
from megatron_lpa.data.storage.dataset_manifest import Manifest, manifest_path, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset, bin_path, idx_path
from megatron_lpa.errors import TryAgain, UserError, shown
from megatron_lpa.files import exists, from_disk, kind_of, status, unreadable
from megatron_lpa.inspection.index_check import check_index
from megatron_lpa.inspection.problems import Problem, ProblemLog
from megatron_lpa.inspection.token_check import TokenExpectations, check_tokens, log_block


@dataclass(frozen=True)
class Verification:
    """What was found.

    Args:
        problems: what is wrong, the first of each kind.
        unlisted: how many more there are by kind.
        unchecked: what could not be checked and why.
    """

    problems: list[Problem]
    unlisted: dict[str, int]
    unchecked: list[str]


def verify(prefix: str) -> Verification:
    """Reads all of a dataset, once, in blocks, and collects what is wrong instead of stopping at it.

    Raises:
        UserError: there is no such dataset, or a file cannot be read.
        TryAgain: the disk does not give a file, which says nothing about the dataset.
    """
    log, unchecked = ProblemLog(), list[str]()
    paths = (idx_path(prefix), bin_path(prefix))
    if not any(exists(path) for path in paths):
        IndexedDataset(prefix)  # it says which mistake that probably is
    manifest = _read_manifest(prefix, log)
    missing = []
    for path in paths:
        found = status(path)
        if found is None or not stat.S_ISREG(found.st_mode):
            missing.append(path)
            what = "no such file" if found is None else f"{kind_of(found.st_mode)}, not a regular file"
            log.add("missing", path, what)
    if missing:
        unchecked.append(f"the rest, without {missing[0].name}")
        return Verification(log.problems, log.unlisted(), unchecked)
    if manifest is None:
        unchecked.append(
            "checksums, ids against the vocabulary, ends of documents, and counts: "
            f"{manifest_path(prefix).name} " + ("is damaged" if log.problems else "does not exist")
        )
    try:
        _verify_files(prefix, manifest, log, unchecked)
    except OSError as error:
        raise unreadable(prefix, error) from error
    return Verification(log.problems, log.unlisted(), unchecked)


def _read_manifest(prefix: str, log: ProblemLog) -> Manifest | None:
    path = manifest_path(prefix)
    try:
        manifest = read_manifest(prefix)
        if manifest is None:
            return None
        check_checksums(prefix, manifest)
        if manifest.dtype not in ("uint16", "int32"):
            raise UserError(f"{path}: a damaged manifest (dtype is {shown(manifest.dtype)})")
    except TryAgain:
        raise
    except UserError as error:
        log.add("manifest", path, str(error).removeprefix(f"{path}: "))
        return None
    return manifest


def _verify_files(prefix: str, manifest: Manifest | None, log: ProblemLog, unchecked: list[str]) -> None:
    path = idx_path(prefix)
    expected_bin_bytes = manifest.tokens * np.dtype(manifest.dtype).itemsize if manifest else None
    dtype = check_index(prefix, log, expected_bin_bytes)
    if manifest is not None:
        checksums = manifest.checksums
        for block in wrong_blocks(path, checksums.idx, checksums.block_bytes):
            log_block(log, path, block, checksums.block_bytes, from_disk(path.stat, path).st_size)
    dataset = _open(prefix, log)
    if manifest is not None:
        _check_counts(prefix, manifest, dataset, log)
        if dataset is None:
            dtype = np.dtype(manifest.dtype)  # rather than that of a damaged index
    if dtype is None:
        unchecked.append(f"the tokens: {path.name} does not tell their dtype")
        return
    ends = manifest is not None and manifest.append_eod and manifest.tokenizer.eod_id is not None
    if ends and dataset is None:
        unchecked.append(f"ends of documents: {path.name} is damaged")
    expected = TokenExpectations()
    if manifest is not None:
        expected = TokenExpectations(
            manifest.checksums.bin,
            manifest.checksums.block_bytes,
            manifest.tokenizer.vocab_size,
            manifest.tokenizer.eod_id if ends else None,
        )
    check_tokens(prefix, dtype, dataset, expected, log)


def _open(prefix: str, log: ProblemLog) -> IndexedDataset | None:
    """The dataset if its index is good. The reader has the last word on that."""
    structure = ("header", "sequences", "documents", "length")
    if any(log.counts.get(kind) for kind in structure):
        return None
    try:
        return IndexedDataset(prefix)
    except TryAgain:
        raise
    except UserError as error:
        log.add("header", Path(idx_path(prefix)), str(error))
        return None


def _check_counts(prefix: str, manifest: Manifest, dataset: IndexedDataset | None, log: ProblemLog) -> None:
    path, item = bin_path(prefix), np.dtype(manifest.dtype).itemsize
    actual_bytes = from_disk(path.stat, path).st_size
    if actual_bytes != manifest.tokens * item and not log.counts.get("length"):
        log.add(
            "length",
            path,
            f"{actual_bytes} bytes, but {manifest_path(prefix).name} records {manifest.tokens} tokens of "
            f"{item}",
            min(actual_bytes, manifest.tokens * item),
            max(actual_bytes, manifest.tokens * item),
        )
    if dataset is None:
        return
    for what, recorded, found in (
        ("documents", manifest.documents, dataset.num_documents),
        ("tokens", manifest.tokens, dataset.num_tokens),
        ("dtype", manifest.dtype, dataset.dtype.name),
    ):
        if recorded != found:
            log.add(
                "counts", manifest_path(prefix), f"{what} {recorded}, but {idx_path(prefix).name} has {found}"
            )
    # Some records belong to no subset, so those can be fewer.
    subsets = manifest.subsets.values()
    for what, found, limit in (
        ("documents by subset", sum(subset.documents for subset in subsets), manifest.documents),
        ("tokens by subset", sum(subset.tokens for subset in subsets), manifest.tokens),
    ):
        if found > limit:
            log.add("counts", manifest_path(prefix), f"{what} sum up to {found}, more than all {limit}")
    by_source = sum(source.documents for source in manifest.sources)
    if manifest.sources and by_source != manifest.documents:
        log.add(
            "counts",
            manifest_path(prefix),
            f"documents by source sum up to {by_source}, not to all {manifest.documents}",
        )
