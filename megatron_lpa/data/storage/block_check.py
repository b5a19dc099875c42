"""Comparing files with the block checksums of their manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lpa.data.storage.checksums import BlockHasher, block_digests
from megatron_lpa.data.storage.dataset_manifest import Manifest, manifest_path
from megatron_lpa.errors import UserError


class BlockComparison:
    """Hashes a stream and compares each block with what was recorded, as soon as the block is whole.

    Args:
        expected: hex SHA-256 of every block.
        block_bytes: bytes per block; the last may be shorter.
    """

    def __init__(self, expected: Sequence[str], block_bytes: int) -> None:
        self._expected = expected
        self._hasher = BlockHasher(block_bytes)
        self._compared = 0

    def update(self, data: bytes | memoryview) -> list[int]:
        """Numbers of the blocks that ``data`` completed and that are not as recorded."""
        self._hasher.update(data)
        return self._compare(self._hasher.whole_digests())

    def finish(self) -> list[int]:
        """The same for the unfinished last block, and for blocks that were recorded but never came."""
        wrong = self._compare(self._hasher.digests())
        return wrong + list(range(self._compared, len(self._expected)))

    def _compare(self, digests: list[str]) -> list[int]:
        start, self._compared = self._compared, len(digests)
        return [
            block
            for block in range(start, len(digests))
            if block >= len(self._expected) or digests[block] != self._expected[block]
        ]


def wrong_blocks(path: Path, expected: Sequence[str], block_bytes: int) -> list[int]:
    """Numbers of the blocks of a file that are not as recorded, missing and surplus ones included.

    Raises:
        UserError: the file cannot be read.
        TryAgain: the disk does not give it.
    """
    found = list(block_digests(path, block_bytes))
    blocks = max(len(found), len(expected))
    return [block for block in range(blocks) if found[block : block + 1] != list(expected[block : block + 1])]


def check_checksums(prefix: str | Path, manifest: Manifest) -> None:
    """Looks at whether the checksums of a manifest are checksums at all.

    Raises:
        UserError: they are not, so the manifest is damaged.
    """
    checksums = manifest.checksums
    problem = ""
    if not isinstance(checksums.block_bytes, int) or checksums.block_bytes < 1:
        problem = f"checksums.block_bytes is {checksums.block_bytes!r}"
    for name, digests in (("bin", checksums.bin), ("idx", checksums.idx)):
        if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
            problem = f"checksums.{name} is not a list of digests"
    if problem:
        raise UserError(
            f"{manifest_path(prefix)}: a damaged manifest ({problem}); "
            "copy it again, or remove the file to do without what it says"
        )
