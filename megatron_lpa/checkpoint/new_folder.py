"""A folder that appears whole or not at all, and never in the place of something else."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_lpa.checkpoint.store import check_free_space, fsync_tree, partial_of
from megatron_lpa.errors import UserError
from megatron_lpa.files import fsync_folder, status


@contextlib.contextmanager
def new_folder(output: Path, needed_bytes: int) -> Iterator[Path]:
    """Where to write what is to become ``output``: ``.NAME.partial`` beside it, renamed when the body has
    ended.

    The body brings its files to disk itself. Whatever ends it early, an exception or Ctrl-C, removes what it
    wrote; only a process that is killed leaves the partial folder behind, under a name that nothing takes for
    a result.

    Args:
        output: must not exist; folders above it are made.
        needed_bytes: what will be written, compared with the free space first.

    Raises:
        UserError: something is there already, or the folder cannot be written; nothing new has the name then.
    """
    partial = partial_of(output)
    try:
        _refuse_existing(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        check_free_space(output.parent, needed_bytes)
        try:
            partial.mkdir()  # fails where another process has made it, so that two never write into one
        except FileExistsError:
            raise UserError(
                f"{partial}: what an earlier conversion left when it was killed, or another one at work; "
                "remove it if none is"
            ) from None
        try:
            yield partial
            fsync_tree(partial)
            _refuse_existing(output)
            os.rename(partial, output)
            fsync_folder(output.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(
            f"{output} could not be written: {error}; free disk space or choose another --output"
        ) from error


def _refuse_existing(output: Path) -> None:
    if status(output, follow_links=False) is not None:
        raise UserError(f"{output}: exists already; choose another --output, or remove it first")
