"""What tells one dataset from another without reading all of it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_lpa.data.storage.indexed import bin_path, idx_path
from megatron_lpa.data.storage.manifest import read_manifest
from megatron_lpa.errors import UserError

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
    tells apart any two datasets that do not agree there by intent; of single tokens changed elsewhere only the
    manifest's checksums tell.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in (idx_path(prefix), bin_path(prefix)):
        _add_ends(digest, path)
        _add_pieces(digest, path)
    return digest.hexdigest()[:32]


def same_files(prefix: str, other: str) -> bool:
    """Whether two prefixes lead to the same ``.bin``, by links or another spelling."""
    try:
        return os.path.samefile(bin_path(prefix), bin_path(other))
    except OSError:
        return False


def index_state(prefix: str) -> str:
    """A hash that changes whenever the ``.idx`` is written anew: what an index in a cache belongs to.

    Raises:
        UserError: a file cannot be read.
    """
    path = idx_path(prefix)
    digest = hashlib.sha256()
    _add_ends(digest, path)
    digest.update(f"{path.stat().st_mtime_ns} {bin_path(prefix).stat().st_size}".encode())
    return digest.hexdigest()


def _add_ends(digest: hashlib._Hash, path: Path) -> None:
    try:
        size_bytes = path.stat().st_size
        digest.update(f"{size_bytes} ".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_END_BYTES))
            stream.seek(max(0, size_bytes - _END_BYTES))
            digest.update(stream.read(_END_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _add_pieces(digest: hashlib._Hash, path: Path) -> None:
    try:
        between_bytes = path.stat().st_size - 2 * _END_BYTES
        if between_bytes <= 0:
            return  # the ends are all of it
        with path.open("rb", buffering=0) as stream:
            for piece in range(_PIECES):
                stream.seek(_END_BYTES + between_bytes * piece // _PIECES)
                digest.update(stream.read(_PIECE_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
