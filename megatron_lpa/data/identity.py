"""What tells one dataset from another without reading all of it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_lpa.data.storage.dataset_manifest import read_manifest
from megatron_lpa.data.storage.indexed import bin_path, idx_path
from megatron_lpa.data.storage.reading import PatientFile
from megatron_lpa.files import from_disk, patiently

_END_BYTES = 1 << 20
_PIECES, _PIECE_BYTES = 64, 1 << 12


@dataclass(frozen=True)
class Identity:
    """What a dataset holds, whatever its place and age.

    Args:
        contents: :func:`contents_digest`.
        checksums: a hash of the manifest's checksums of every block of both files; None without a manifest.
    """

    contents: str
    checksums: str | None

    def same_as(self, other: Identity) -> bool:
        """Whether both are of the same tokens, as far as the two can tell."""
        known = self.checksums is not None and other.checksums is not None
        return self.contents == other.contents and (self.checksums == other.checksums or not known)


def identity_of(prefix: str) -> Identity:
    """What the dataset at ``prefix`` holds.

    Raises:
        UserError: a file cannot be read, or the manifest is damaged.
        TryAgain: the disk does not give a file.
    """
    manifest = read_manifest(prefix)
    checksums = None
    if manifest is not None and manifest.checksums.bin:
        blocks = [str(manifest.checksums.block_bytes), *manifest.checksums.bin, "", *manifest.checksums.idx]
        checksums = hashlib.sha256("\n".join(blocks).encode()).hexdigest()[:32]
    return Identity(contents_digest(prefix), checksums)


def contents_digest(prefix: str) -> str:
    """A hash of a dataset that neither its place nor its age changes, nor its manifest: 32 hex digits.

    Sizes of both files, the first and last MiB of each, and 64 pieces of 4 KiB evenly spaced between. That
    tells apart any two datasets that do not agree there by intent; of single tokens changed elsewhere only
    the manifest's checksums tell.

    Raises:
        UserError: a file cannot be read.
        TryAgain: the disk does not give a file.
    """
    digest = hashlib.sha256()
    for path in (idx_path(prefix), bin_path(prefix)):
        digest.update(from_disk(partial(_ends, path), path))
        digest.update(from_disk(partial(_pieces, path), path))
    return digest.hexdigest()[:32]


def same_files(prefix: str, other: str) -> bool:
    """Whether two prefixes lead to the same ``.bin``, by links or another spelling.

    Raises:
        TryAgain: the disk does not tell.
    """
    paths = bin_path(prefix), bin_path(other)
    try:
        return patiently(lambda: os.path.samefile(*paths), paths[1])
    except OSError:
        return False


def index_state(prefix: str) -> str:
    """A hash that changes whenever the ``.idx`` is written anew: what an index in a cache belongs to.

    Raises:
        UserError: a file cannot be read.
        TryAgain: the disk does not give a file.
    """
    idx, bin_ = idx_path(prefix), bin_path(prefix)
    digest = hashlib.sha256(from_disk(lambda: _ends(idx), idx))
    state = from_disk(lambda: f"{idx.stat().st_mtime_ns} {bin_.stat().st_size}", idx)
    digest.update(state.encode())
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    """The size of a file, and its first and last MiB."""
    with PatientFile(path) as file:
        size_bytes = file.size_bytes
        length = min(size_bytes, _END_BYTES)
        ends = file.read_at(0, length), file.read_at(size_bytes - length, length)
    return b"".join((f"{size_bytes} ".encode(), *ends))


def _pieces(path: Path) -> bytes:
    """Pieces from between the ends."""
    with PatientFile(path) as file:
        between_bytes = file.size_bytes - 2 * _END_BYTES
        if between_bytes <= 0:
            return b""  # the ends are all of it
        starts = (_END_BYTES + between_bytes * piece // _PIECES for piece in range(_PIECES))
        return b"".join(file.read_at(start, min(_PIECE_BYTES, file.size_bytes - start)) for start in starts)
