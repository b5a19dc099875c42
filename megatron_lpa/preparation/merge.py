"""Several token datasets into one, as if their texts had been preprocessed in one go."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

import megatron_lpa
from megatron_lpa.data.storage.block_check import BlockComparison
from megatron_lpa.data.storage.byte_progress import ByteProgress
from megatron_lpa.data.storage.checksums import BlockHasher
from megatron_lpa.data.storage.dataset_manifest import (
    Checksums,
    Manifest,
    SubsetCount,
    manifest_path,
    write_manifest,
)
from megatron_lpa.data.storage.indexed import HEADER, bin_path, check_output_prefix, idx_path
from megatron_lpa.data.storage.indexed_writer import publish_dataset, write_index
from megatron_lpa.data.storage.partial_file import PARTIAL_SUFFIX, PartialFile, explained_write_errors
from megatron_lpa.data.storage.reading import blocks_of
from megatron_lpa.errors import UserError
from megatron_lpa.files import exists, status
from megatron_lpa.preparation.merge_inputs import (
    MergeInput,
    check_alike,
    damaged,
    read_input,
    resolve_prefixes,
)

_COPY_BYTES = 1 << 22
_INDEX_BLOCK = 1 << 20  # entries of the index in memory at a time


def merge(
    inputs: Sequence[str],
    output_prefix: str,
    overwrite: bool = False,
    verify: bool = True,
    expect: int | None = None,
    allow_missing_manifests: bool = False,
    allow_same_sources: bool = False,
) -> Manifest | None:
    """Writes ``<output_prefix>.bin``, ``.idx`` and ``.json`` from whole datasets, in order.

    The ``.bin`` and ``.idx`` are byte for byte what preprocessing everything at once would have written.
    Documents keep their sequences, and documents without any are kept. Memory does not grow with the data.
    A killed merge leaves only ``*.partial`` files, which the next call reuses.

    Args:
        inputs: prefixes and glob patterns; see :func:`merge_inputs.resolve_prefixes`.
        output_prefix: path without endings; its folder is created.
        overwrite: replace existing output.
        verify: compare every input with the block checksums in its manifest while reading it.
        expect: how many datasets the inputs have to be.
        allow_missing_manifests: merge although some inputs have a manifest and some have none.
        allow_same_sources: merge although two inputs were made from one file, as for two of its subsets.

    Returns:
        The manifest of the output; ``None``, and none is written, where an input has none: what is not
        known of a part is not known of the whole.

    Raises:
        UserError: inputs are missing, damaged, named twice or do not belong together, the output exists
            or is an input, there is no room, or another process is writing the output.
    """
    if output_prefix.endswith((".bin", ".idx", ".json")):
        raise UserError(
            f"{output_prefix}: give the prefix without its ending: {output_prefix.rpartition('.')[0]}"
        )
    check_output_prefix(output_prefix, "--output-prefix")
    prefixes = resolve_prefixes(inputs, output_prefix)
    if expect is not None and len(prefixes) != expect:
        raise UserError(
            f"{len(prefixes)} of {expect} expected datasets found ({prefixes[0]} to {prefixes[-1]}); "
            "make the missing ones, or correct the pattern or the number expected"
        )
    _check_output(output_prefix, overwrite)
    parts = [read_input(prefix, verify) for prefix in prefixes]
    check_alike(parts, allow_missing_manifests, allow_same_sources)
    _check_room(output_prefix, parts)
    checksums = _write(output_prefix, parts, verify)
    manifests = [part.manifest for part in parts if part.manifest is not None]
    if len(manifests) < len(parts):
        return None
    manifest = _merged(manifests, checksums)
    write_manifest(output_prefix, manifest)
    return manifest


def _check_output(prefix: str, overwrite: bool) -> None:
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        if exists(path) and not overwrite:
            raise UserError(f"{path}: exists; choose another --output-prefix or pass --overwrite")


def _check_room(prefix: str, parts: Sequence[MergeInput]) -> None:
    tokens_bytes = sum(part.tokens for part in parts) * parts[0].dtype.itemsize
    sequences, documents = sum(part.sequences for part in parts), sum(part.documents for part in parts)
    needed_bytes = tokens_bytes + HEADER.size + 12 * sequences + 8 * (documents + 1)
    folder = bin_path(prefix).absolute().parent
    while not exists(folder):
        folder = folder.parent
    with explained_write_errors(folder):
        disk = os.statvfs(folder)
    free_bytes = disk.f_bavail * disk.f_frsize
    for path in (bin_path(prefix), idx_path(prefix)):  # leftovers of a killed merge, which are written over
        leftover = status(path.with_name(path.name + PARTIAL_SUFFIX))
        if leftover is not None:
            free_bytes += leftover.st_blocks * 512
    if free_bytes < needed_bytes:
        raise UserError(
            f"{prefix}: needs {needed_bytes} bytes, but {folder} has only {free_bytes} free; "
            "free space or write to another folder"
        )


def _write(prefix: str, parts: Sequence[MergeInput], verify: bool) -> Checksums:
    """Writes and publishes the two files, without a manifest beside them."""
    file, hasher = PartialFile.open(bin_path(prefix)), BlockHasher()
    progress = ByteProgress(
        f"merging into {prefix}", sum(part.tokens * part.dtype.itemsize for part in parts)
    )
    try:
        for part in parts:
            _copy_tokens(part, file, hasher, verify, progress)
        file.finish()
        idx_file, idx_digests = write_index(
            prefix,
            parts[0].dtype,
            lambda: _sizes(parts),
            sum(part.sequences for part in parts),
            _document_indices(parts),
            sum(part.documents for part in parts),
        )
        try:
            with explained_write_errors(manifest_path(prefix)):  # it must never describe other files
                manifest_path(prefix).unlink(missing_ok=True)
            publish_dataset(file, idx_file)
        finally:
            idx_file.discard()
    finally:
        file.discard()
    return Checksums(hasher.digests(), idx_digests)


def _copy_tokens(
    part: MergeInput, file: PartialFile, hasher: BlockHasher, verify: bool, progress: ByteProgress
) -> None:
    path, size_bytes = bin_path(part.prefix), part.tokens * part.dtype.itemsize
    manifest = part.manifest if verify else None
    block_bytes = manifest.checksums.block_bytes if manifest else 1
    comparison = BlockComparison(manifest.checksums.bin, block_bytes) if manifest else None
    copied_bytes = 0
    for data in blocks_of(path, _COPY_BYTES):
        for block in comparison.update(data) if comparison else ():
            raise damaged(path, block, block_bytes, size_bytes)
        file.write(data)
        hasher.update(data)
        copied_bytes += len(data)
        progress.add(len(data))
    for block in comparison.finish() if comparison else ():
        raise damaged(path, block, block_bytes, size_bytes)
    if copied_bytes != size_bytes:
        raise UserError(
            f"{path}: {copied_bytes} bytes instead of {size_bytes}; it was changed while it was merged: "
            "wait until nothing writes it and merge again"
        )


def _sizes(parts: Sequence[MergeInput]) -> Iterator[np.ndarray]:
    """Tokens of every sequence: int32 blocks."""
    for part in parts:
        dataset = part.open()
        for start in range(0, part.sequences, _INDEX_BLOCK):
            yield dataset.sequence_sizes(start, min(start + _INDEX_BLOCK, part.sequences))


def _document_indices(parts: Sequence[MergeInput]) -> Iterator[np.ndarray]:
    """First sequence of every document among those of all parts, then their number: int64 blocks."""
    sequences_before = 0
    for part in parts:
        dataset = part.open()
        for start in range(0, part.documents, _INDEX_BLOCK):
            stop = min(start + _INDEX_BLOCK, part.documents)
            yield dataset.document_indices(start, stop) + sequences_before
        sequences_before += part.sequences
    yield np.array([sequences_before], dtype="<i8")


def _common(selections: Sequence[list[str]]) -> list[str]:
    return selections[0] if all(selection == selections[0] for selection in selections) else []


def _merged(manifests: Sequence[Manifest], checksums: Checksums) -> Manifest:
    first = manifests[0]
    subsets: dict[str, SubsetCount] = {}
    for manifest in manifests:
        for name, count in manifest.subsets.items():
            before = subsets.get(name, SubsetCount(0, 0))
            subsets[name] = SubsetCount(before.documents + count.documents, before.tokens + count.tokens)
    return Manifest(
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        empty_documents=sum(manifest.empty_documents for manifest in manifests),
        dropped_documents=sum(manifest.dropped_documents for manifest in manifests),
        rejected_documents=sum(manifest.rejected_documents for manifest in manifests),
        bytes_text=sum(manifest.bytes_text for manifest in manifests),
        words=sum(manifest.words for manifest in manifests),
        dtype=first.dtype,
        json_key=first.json_key,
        append_eod=first.append_eod,
        tokenizer=first.tokenizer,
        checksums=checksums,
        sources=[source for manifest in manifests for source in manifest.sources],
        subsets=dict(sorted(subsets.items())),
        keep_subsets=_common([manifest.keep_subsets for manifest in manifests]),
        dropped_subsets=dict(sum((Counter(manifest.dropped_subsets) for manifest in manifests), Counter())),
        drop_subsets=_common([manifest.drop_subsets for manifest in manifests]),
        version=megatron_lpa.__version__,
    )
