"""Names inside a run folder, and what keeps a run from writing outside it.

A run folder may come from a stranger, unpacked from an archive, or lie where others write too. A link in it
would lead a write, or the removal of old checkpoints, to its target. So a run refuses a folder with links at
the names that it writes, before it writes anything; the writes themselves follow none either. The run folder
itself may be a link.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_lpa.errors import UserError
from megatron_lpa.files import UnusableFile, exists, is_file, kind_of, names_in, patiently

LOCK = ".lock"
METRICS = "metrics.jsonl"
DAMAGED_METRICS = "metrics.damaged.jsonl"
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
STEP = "step_"
"""Begins a checkpoint's name; its step follows in eight digits or more."""
CHECKPOINT = rf"{STEP}[0-9]{{8,}}"
"""What the names of checkpoints match."""
MANIFEST = "manifest.json"
"""In a checkpoint; without it, a checkpoint is not complete."""
DAMAGED, PASSED = "damaged_", "passed_"
"""Before the names of checkpoints that were set aside."""
PASSED_OVER = "passed_over.json"
DAMAGE_NOTE = "DAMAGED.txt"
TOKENIZER = "tokenizer"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
WANDB_ID = "wandb_id"
SUPERSEDED = f"{WANDB}/superseded"
LOGS = "logs"
HANG = "hang"
STARTS = "starts.jsonl"
SNAPSHOT = "snapshot"

_FOLDER, _FILE, _EITHER = "a folder", "a regular file", "a regular file or a folder"
# A folder comes before what is in it: nothing is looked at through a link. W&B makes links of its own in its
# folder.
_WRITTEN = (
    (CHECKPOINTS, _FOLDER), (LOGS, _FOLDER), (f"{LOGS}/{HANG}", _FOLDER), (TOKENIZER, _FOLDER), (TENSORBOARD,
    _FOLDER),
    (WANDB, _FOLDER), (f".{WANDB}", _FOLDER), (SUPERSEDED, _FOLDER), (SNAPSHOT, _FOLDER),
    (f".{SNAPSHOT}.*", _FOLDER),
    (LOCK, _FILE), (METRICS, _FILE), ("metrics.damaged*.jsonl", _FILE), (CONFIG, _FILE), (WANDB_ID, _FILE),
    (".*.partial", _FILE),
    (f"{CHECKPOINTS}/{STEP}*", _FOLDER), (f"{CHECKPOINTS}/.{STEP}*", _FOLDER), (f"{CHECKPOINTS}/{DAMAGED}*",
    _FOLDER),
    (f"{CHECKPOINTS}/{PASSED}{STEP}*", _FOLDER),
    (f"{CHECKPOINTS}/{PASSED_OVER}", _FILE), (f"{CHECKPOINTS}/*{STEP}*/{DAMAGE_NOTE}", _FILE),
    (f"{TOKENIZER}/*", _FILE), (f"{TENSORBOARD}/*", _EITHER), (f"{LOGS}/*", _EITHER), (f"{LOGS}/{HANG}/*",
    _FILE),
)  # fmt: skip
_IS: dict[str, Callable[[int], bool]] = {
    _FOLDER: stat.S_ISDIR,
    _FILE: stat.S_ISREG,
    _EITHER: lambda mode: stat.S_ISDIR(mode) or stat.S_ISREG(mode),
}
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"{STEP}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix(STEP))


def newest_step(folder: Path) -> int:
    """Step of the newest complete checkpoint of a run folder, by names alone; 0 without one.

    A checkpoint that cannot be looked at is passed over.

    Raises:
        UserError: the folder of checkpoints may not be read.
        TryAgain: the disk does not answer.
    """
    checkpoints, newest = folder / CHECKPOINTS, 0
    for path in (checkpoints / name for name in names_in(checkpoints) if re.fullmatch(CHECKPOINT, name)):
        with contextlib.suppress(UserError):
            # More digits are no step of a run, and no number that a shell computes with.
            if newest < step_of(path) < 10**15 and is_file(path / MANIFEST):
                newest = step_of(path)
    return newest


def refuse_links(folder: Path) -> None:
    """Make sure that everything of a run folder that a run writes is a folder or a regular file of its own.

    Args:
        folder: the run folder; it may be a link, and need not exist.

    Raises:
        UserError: a link, a device, a pipe, or a folder where a file belongs, or a file where the run folder
            or one above it belongs; the message names it.
        TryAgain: the disk does not answer.
    """
    _refuse_file(folder)
    for pattern, expected in _WRITTEN:
        for path in _found(folder, pattern):
            try:
                mode = patiently(lambda path=path: os.lstat(path).st_mode, path)  # type: ignore[misc]
            except OSError as error:
                if error.errno in _NOT_THERE:
                    continue
                raise UserError(f"{shown(path)}: cannot be looked at ({error.strerror})") from error
            if not _IS[expected](mode):
                raise UserError(_refusal(path, mode, expected))


def refuse_unwritable(folder: Path) -> None:
    """Make sure that a run folder, and what a start writes anew in it, may be written by this user.

    Args:
        folder: the run folder; it need not exist.

    Raises:
        UserError: it may not; the message names the path.
        TryAgain: the disk does not answer.
    """
    for path in (folder, folder / METRICS, folder / CONFIG, folder / CHECKPOINTS):
        if exists(path) and not os.access(path, os.R_OK | os.W_OK):
            raise UserError(
                f"{shown(path)}: may not be written by this user; see to its permissions, or choose another "
                "logging.run_dir or logging.name"
            )


def _refuse_file(folder: Path) -> None:
    """Raise where the run folder cannot be made, as what has its name, or that of one above it, is no
    folder."""
    for path in (folder, *folder.parents):
        try:
            mode = patiently(lambda path=path: os.stat(path).st_mode, path)  # type: ignore[misc]
        except OSError as error:
            if error.errno in _NOT_THERE and os.path.islink(path):
                raise UserError(
                    f"{shown(path)}: a link to nothing, where {_needed(path, folder)}; remove it, or make "
                    "what it leads to"
                ) from error
            if error.errno not in _NOT_THERE:
                return  # the start that needs it says why it cannot be used
            continue
        if not stat.S_ISDIR(mode):
            raise UserError(
                f"{shown(path)}: {kind_of(mode)}, where {_needed(path, folder)}; choose another "
                "logging.run_dir or logging.name, or remove it"
            )
        return


def _needed(path: Path, folder: Path) -> str:
    return "the run folder belongs" if path == folder else f"a folder for {shown(folder)} belongs"


def _found(folder: Path, pattern: str) -> Iterator[Path]:
    """Paths that a pattern may mean; those without a star need not exist."""
    first, _, rest = pattern.partition("/")
    names = [first]
    if "*" in first:
        try:
            names = sorted(fnmatch.filter(patiently(lambda: os.listdir(folder), folder), first))
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise UserError(f"{shown(folder)}: cannot be listed ({error.strerror})") from error
            return
    for name in names:
        if rest:
            yield from _found(folder / name, rest)
        else:
            yield folder / name


def _refusal(path: Path, mode: int, expected: str) -> str:
    if not stat.S_ISLNK(mode):
        return (
            f"{shown(path)}: {kind_of(mode)}, where a run has {expected}; remove it or give it another name"
        )
    try:
        target = shown(os.readlink(path))
    except OSError:
        target = "somewhere else"
    return (
        f"{shown(path)}: a link to {target}, and a run writes only inside its own folder; put {expected} in "
        "its place, or remove it (the whole run folder, or logging.run_dir, may be a link)"
    )


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message: one line, whatever a stranger called a file."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def open_own(path: Path, other_names: bool = False) -> BinaryIO:
    """Open a file of a run folder to read it and to append to it, unbuffered; it is made where there is none.

    Args:
        path: the file.
        other_names: accept one that has another name as well (a hard link), which may lie elsewhere. Do not
            write it.

    Raises:
        UnusableFile: a link, no regular file, or a file that has another name as well.
        OSError: it cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise UnusableFile(f"{path}: a link, or no regular file; remove it") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnusableFile(f"{path}: {kind_of(status.st_mode)}, not a regular file; remove it")
        if status.st_nlink > 1 and not other_names:
            raise UnusableFile(
                f"{path}: the same file has another name as well (a hard link), and would change there too; "
                "remove this one, unless a run is writing here"
            )
        return os.fdopen(descriptor, "r+b", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


if __name__ == "__main__":  # for the SLURM scripts: python -m megatron_lpa.run_folder RUN_FOLDER
    print(newest_step(Path(sys.argv[1])))
