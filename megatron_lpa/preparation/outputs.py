"""The files of a preprocessing run, written side by side: one dataset per key, and the rejected records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_lpa.data.storage.checksums import block_digests
from megatron_lpa.data.storage.dataset_manifest import Checksums, manifest_path
from megatron_lpa.data.storage.indexed import bin_path, idx_path
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter, WriterPosition, sizes_path
from megatron_lpa.data.storage.partial_file import PARTIAL_SUFFIX, PartialFile, explained_write_errors
from megatron_lpa.errors import UserError
from megatron_lpa.files import exists, fsync_folder, status
from megatron_lpa.preparation.documents import Rejection
from megatron_lpa.preparation.encode import EncodedDocuments
from megatron_lpa.preparation.ledger import State


class Outputs:
    """A context manager around the unfinished files of a run, opened where ``state`` left them.

    Files left unfinished when the block ends stay for the next run, unless ``discard`` was called.

    Args:
        prefixes: of the datasets.
        reject_path: of the reject file.
        dtype: of the ids.
        state: where an earlier run stopped.

    Raises:
        UserError: a file cannot be written, or is shorter than ``state`` says.
    """

    def __init__(self, prefixes: list[str], reject_path: Path, dtype: np.dtype[Any], state: State) -> None:
        self.prefixes = prefixes
        self.rejected_bytes = state.rejected_bytes
        self._dtype = dtype
        self._state = state
        self._reject_path = reject_path
        self._writers: list[IndexedDatasetWriter] = []
        self._rejects: PartialFile | None = None
        self._published: dict[str, Checksums] = {}
        self._keep_unfinished = True
        self._names_on_disk = False

    def __enter__(self) -> Outputs:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _open(self) -> None:
        state = self._state
        for prefix, position in zip(self.prefixes, state.writers, strict=True):
            if state.all_read and self._published_before_kill(prefix, position):
                self._published[prefix] = _checksums_of_files(prefix)
                continue
            writer = IndexedDatasetWriter(prefix, self._dtype, position)
            writer.open()
            self._writers.append(writer)
        published = state.all_read and state.rejected and not exists(_partial(self._reject_path))
        if not published:
            self._rejects = PartialFile.open(self._reject_path, state.rejected_bytes)

    def _close(self) -> None:
        for writer in self._writers:
            writer.close(self._keep_unfinished)
        if self._rejects is not None:
            if self._keep_unfinished:
                self._rejects.close()
            else:
                self._rejects.discard()

    def discard(self) -> None:
        """Remove the unfinished files at the end of the block."""
        self._keep_unfinished = False

    def add(self, outputs: list[EncodedDocuments], rejected: list[Rejection]) -> None:
        """Appends the documents of one chunk, and its bad records.

        Raises:
            UserError: the disk is full.
        """
        for writer, documents in zip(self._writers, outputs, strict=True):
            writer.add_documents(documents.tokens, documents.sizes)
        for rejection in rejected:
            assert self._rejects is not None
            line = (json.dumps(rejection.to_json(), ensure_ascii=False) + "\n").encode()
            self._rejects.write(line)
            self.rejected_bytes += len(line)

    @property
    def positions(self) -> list[WriterPosition]:
        return [writer.position for writer in self._writers]

    def sync(self) -> None:
        """Brings everything added so far to disk.

        Raises:
            UserError: the disk is full.
        """
        for writer in self._writers:
            writer.sync()
        if self._rejects is not None:
            self._rejects.finish()
        if not self._names_on_disk:  # or a power cut could leave the ledger and not what it tells of
            fsync_folder(self._reject_path.absolute().parent)
            self._names_on_disk = True

    def publish(self) -> dict[str, Checksums]:
        """Gives all files their names, after taking away manifests that would describe others.

        Returns:
            the checksums of each dataset by its prefix.

        Raises:
            UserError: the folder cannot be written.
        """
        self.publish_rejected()
        for writer in self._writers:
            manifest = manifest_path(writer.prefix)
            with explained_write_errors(manifest):
                manifest.unlink(missing_ok=True)
            self._published[writer.prefix] = writer.publish()
        return {prefix: self._published[prefix] for prefix in self.prefixes}

    def publish_rejected(self) -> None:
        """Gives the reject file its name, or removes it where no record was bad.

        Raises:
            UserError: the folder cannot be written.
        """
        if self._rejects is None:
            return
        if self.rejected_bytes:
            self._rejects.finish()
            self._rejects.publish()
        else:
            self._rejects.discard()
            with explained_write_errors(self._reject_path):
                self._reject_path.unlink(missing_ok=True)  # of an earlier run that this one replaces

    def _published_before_kill(self, prefix: str, position: WriterPosition) -> bool:
        """Whether a run that had read everything already gave both files their names.

        Where it was killed after the first of the two names, that one is taken back.
        """
        unfinished, finished = _partial(bin_path(prefix)), bin_path(prefix)
        if exists(unfinished):
            return False
        if exists(idx_path(prefix)):
            return True
        found = status(finished)
        if found is None or found.st_size != position.tokens * self._dtype.itemsize:
            raise UserError(
                f"{unfinished}: gone, although the run that wrote it was not complete; start again with "
                "--restart"
            )
        with explained_write_errors(finished):
            os.rename(finished, unfinished)
        return False


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL_SUFFIX)


def _checksums_of_files(prefix: str) -> Checksums:
    _partial(sizes_path(prefix)).unlink(missing_ok=True)
    return Checksums(list(block_digests(bin_path(prefix))), list(block_digests(idx_path(prefix))))
