"""Which datasets a merge reads, and whether they belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lpa.command_line import natural_key
from megatron_lpa.data.storage.block_check import check_checksums, wrong_blocks
from megatron_lpa.data.storage.dataset_manifest import Manifest, manifest_path, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset, bin_path, idx_path
from megatron_lpa.data.storage.partial_file import PARTIAL_SUFFIX
from megatron_lpa.errors import UserError
from megatron_lpa.files import exists, from_disk
from megatron_lpa.preparation.patterns import files_matching

_ENDINGS = (".idx", ".bin", ".json")


@dataclass(frozen=True)
class MergeInput:
    """One dataset that was looked at. It keeps no file open: an array job's hundreds would be too many.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: of its tokens.
        documents, sequences, tokens: what it holds.
        manifest: what is recorded of it, if anything.
    """

    prefix: str
    dtype: np.dtype[Any]
    documents: int
    sequences: int
    tokens: int
    manifest: Manifest | None

    def open(self) -> IndexedDataset:
        return IndexedDataset(self.prefix, check=False)


def resolve_prefixes(names: Sequence[str], output_prefix: str) -> list[str]:
    """The prefixes that names and glob patterns stand for, in the order given, each pattern's sorted
    naturally.

    The endings ``.idx``, ``.bin`` and ``.json`` may be there or not.

    Raises:
        UserError: a pattern matches nothing or an unfinished dataset, a dataset is named twice, or the
            output is among the inputs.
    """
    try:
        return _resolved(names, output_prefix)
    except (OSError, RuntimeError) as error:  # before Python 3.13 a loop of links is a RuntimeError
        raise UserError(
            f"{', '.join(names)[:300]}: cannot be looked up ({error}); check the paths"
        ) from error


def _resolved(names: Sequence[str], output_prefix: str) -> list[str]:
    prefixes = [prefix for name in names for prefix in _expand(name, output_prefix)]
    seen: dict[Path, str] = {}
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix)):
            if path.resolve() == Path(f"{output_prefix}{path.suffix}").resolve():
                raise UserError(
                    f"{prefix}: is the output and among the inputs; choose another --output-prefix, "
                    "or a pattern that does not match it"
                )
            if path.resolve() in seen:
                other = seen[path.resolve()]
                named = "is named twice" if other == prefix else f"is the same data as {other}"
                raise UserError(
                    f"{prefix}: {named}, so its documents would be there twice; name it once "
                    "(of .bin, .idx and .json one is enough)"
                )
            seen[path.resolve()] = prefix
    return prefixes


def _expand(name: str, output_prefix: str) -> list[str]:
    if exists(idx_path(name)) or exists(bin_path(name)):
        return [name]
    if not any(character in name for character in "*?[") or exists(name):
        return [_without_ending(name)]  # a missing one is refused when it is opened
    found = [path for path in files_matching(name) if path.endswith(_ENDINGS)]
    found += files_matching(f"{name}.idx")
    prefixes = sorted({_without_ending(path) for path in found}, key=natural_key)
    # A shard that is still being written has no index yet. Passed over, it would be missing for good.
    partial_ending = f".bin{PARTIAL_SUFFIX}"
    for path in files_matching(f"{_without_ending(name)}{partial_ending}"):
        prefix = path[: -len(partial_ending)]
        if not exists(idx_path(prefix)) and Path(prefix).resolve() != Path(output_prefix).resolve():
            raise UserError(
                f"{path}: matches {name}, but is unfinished; let its tool finish, run it again, "
                "or remove the file"
            )
    if not prefixes:
        raise UserError(f"{name}: no dataset matches; check the pattern")
    return prefixes


def _without_ending(name: str) -> str:
    return name[: name.rindex(".")] if name.endswith(_ENDINGS) else name


def read_input(prefix: str, verify: bool) -> MergeInput:
    """Looks at one dataset: its whole index, and what its manifest says of it. No token is read.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        verify: compare the index with its recorded checksums.

    Raises:
        UserError: a file is missing or damaged, or the manifest belongs to other files.
    """
    dataset, manifest = IndexedDataset(prefix), read_manifest(prefix)
    if manifest is not None:
        check_checksums(prefix, manifest)
        for what, recorded, found in (
            ("documents", manifest.documents, dataset.num_documents),
            ("tokens", manifest.tokens, dataset.num_tokens),
            ("dtype", manifest.dtype, dataset.dtype.name),
        ):
            if recorded != found:
                raise UserError(
                    f"{manifest_path(prefix)}: says {what} {recorded}, but {idx_path(prefix).name} {found}; "
                    "they do not belong together: copy all three files again"
                )
        if verify:
            checksums, path = manifest.checksums, idx_path(prefix)
            for block in wrong_blocks(path, checksums.idx, checksums.block_bytes):
                raise damaged(path, block, checksums.block_bytes, from_disk(path.stat, path).st_size)
    return MergeInput(
        prefix, dataset.dtype, dataset.num_documents, dataset.num_sequences, dataset.num_tokens, manifest
    )


def damaged(path: Path, block: int, block_bytes: int, size_bytes: int) -> UserError:
    """What to say of a block that is not as recorded."""
    start, stop = block * block_bytes, min((block + 1) * block_bytes, max(size_bytes, 1))
    return UserError(
        f"{path}: damaged: block {block} (bytes {start} to {stop - 1}) does not have the SHA-256 that "
        f"{path.with_suffix('.json').name} records; copy or make this dataset again, or pass --no-verify"
    )


def check_alike(
    inputs: Sequence[MergeInput], allow_missing_manifests: bool, allow_same_sources: bool = False
) -> None:
    """
    Raises:
        UserError: the datasets differ in how they were made, only some have a manifest, or two come from
            the same file.
    """
    first = inputs[0]
    for other in inputs[1:]:
        if other.dtype != first.dtype:
            raise UserError(
                f"{other.prefix}: holds {other.dtype.name} ids, but {first.prefix} {first.dtype.name}; "
                "tokenize both with the same tokenizer"
            )
    described = [input for input in inputs if input.manifest is not None]
    bare = [input.prefix for input in inputs if input.manifest is None]
    if described and bare and not allow_missing_manifests:
        raise UserError(
            f"{manifest_path(bare[0])}: no such file, while {described[0].prefix} has one "
            f"({len(bare)} of {len(inputs)} inputs have none); copy the manifests too, or pass "
            "--allow-missing-manifests to merge unchecked and without a manifest"
        )
    for other in described[1:]:
        _check_same_making(described[0], other)
    if not allow_same_sources:
        _check_different_sources(described)


def _check_different_sources(inputs: Sequence[MergeInput]) -> None:
    seen: dict[Any, str] = {}
    for input in inputs:
        assert input.manifest is not None
        for source in input.manifest.sources:
            key = source.sha256 or (source.path, source.config, source.split)
            if source.documents and seen.setdefault(key, input.prefix) != input.prefix:
                raise UserError(
                    f"{input.prefix}: was made from {source.path}, and so was {seen[key]}: its documents "
                    "would be there twice; leave one out, or pass --allow-same-sources, as for two subsets "
                    "of one file"
                )


def _check_same_making(first: MergeInput, other: MergeInput) -> None:
    ours, theirs = first.manifest, other.manifest
    assert ours is not None and theirs is not None
    for what, mine, its, way_out in (
        (
            "a tokenizer of fingerprint",
            ours.tokenizer.fingerprint,
            theirs.tokenizer.fingerprint,
            "tokenize both with one",
        ),
        # The fingerprint is of the model file; tokenizer_config.json can still name another end token.
        (
            "end-of-document id",
            ours.tokenizer.eod_id,
            theirs.tokenizer.eod_id,
            "give both the same eos_token in tokenizer_config.json and tokenize again",
        ),
        (
            "a vocabulary of",
            ours.tokenizer.vocab_size,
            theirs.tokenizer.vocab_size,
            "tokenize both with one tokenizer",
        ),
        ("append_eod", ours.append_eod, theirs.append_eod, "make both with --append-eod or both without"),
        ("json_key", ours.json_key, theirs.json_key, "merge datasets of one key"),
    ):
        if mine != its:
            raise UserError(
                f"{manifest_path(other.prefix)}: has {what} {its}, but {manifest_path(first.prefix)} {mine}; "
                f"{way_out}"
            )
