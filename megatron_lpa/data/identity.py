"""What tells one dataset from another without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_lpa.data.storage.indexed import bin_path, idx_path
from megatron_lpa.errors import UserError

_END_BYTES = 1 << 20


def contents_digest(prefix: str) -> str:
    """A hash of a dataset that neither its place nor its age changes: 32 hex digits.

    Sizes of both files, and the first and last MiB of each. That tells apart any two datasets that do not
    agree there by intent; comparing every token is what the manifest's checksums are for.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in (idx_path(prefix), bin_path(prefix)):
        _add_ends(digest, path)
    return digest.hexdigest()[:32]


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
