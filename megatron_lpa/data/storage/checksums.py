"""SHA-256 of a file in blocks, so that damage can be found by its offset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_lpa.data.storage.reading import stream_of
from megatron_lpa.files import unreadable

BLOCK_BYTES = 1 << 26
_READ_BYTES = 1 << 22


class BlockHasher:
    """Hashes a stream of bytes in blocks of ``block_bytes``; the last one may be shorter.

    Args:
        block_bytes: bytes per block.
        digests: hex digests of the blocks already hashed, when a stream goes on at a block's end.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES, digests: Sequence[str] = ()) -> None:
        self._block_bytes = block_bytes
        self._whole = list(digests)
        self._hash = hashlib.sha256()
        self._filled_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: self._block_bytes - self._filled_bytes]
            self._hash.update(part)
            self._filled_bytes += len(part)
            view = view[len(part) :]
            if self._filled_bytes == self._block_bytes:
                self._whole.append(self._hash.hexdigest())
                self._hash, self._filled_bytes = hashlib.sha256(), 0

    def whole_digests(self) -> list[str]:
        """Hex digest of every finished block so far."""
        return list(self._whole)

    def digests(self) -> list[str]:
        """Hex digest of every block so far, an unfinished one included."""
        return [*self._whole, self._hash.hexdigest()] if self._filled_bytes else list(self._whole)


def block_digests(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[str]:
    """Hex SHA-256 of each block of a file, in order.

    Raises:
        UserError: the file cannot be read.
        TryAgain: the disk does not give it.
    """
    try:
        with stream_of(path) as stream:
            while True:
                block, left_bytes, empty = hashlib.sha256(), block_bytes, True
                while left_bytes and (data := stream.read(min(_READ_BYTES, left_bytes))):
                    block.update(data)
                    left_bytes -= len(data)
                    empty = False
                if empty:
                    return
                yield block.hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
