"""The ``checkpoints`` folder of a run: what appears there, what goes, and what a killed process leaves.

Names change by single renames, so that every folder called ``step_NNNNNNNN`` is a whole checkpoint or was
damaged from outside. What is on its way in or out has a name of its own:

| name | what it is | what ``tidy`` does with it |
|---|---|---|
| ``.step_NNNNNNNN.partial`` | being written | removes it |
| ``.step_NNNNNNNN.removed`` | being removed | removes it |
| ``.step_NNNNNNNN.replaced`` | an older one of the same step, until the new one has its name | gives it its name back if that is free |
| ``damaged_step_NNNNNNNN`` | found damaged and skipped, with a note inside | nothing |
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_lpa.config import TrainConfig
from megatron_lpa.engine.manifest import (
    MANIFEST,
    checkpoint_folders,
    complete_checkpoints,
    described,
    paths_in,
    step_of,
)
from megatron_lpa.errors import UserError
from megatron_lpa.files import fsync_folder, new_file

NOTE = "DAMAGED.txt"
REPLACED = r"\.step_.*\.replaced"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is complete; those that any rule names do.

    Args:
        newest: how many of the newest; 0 keeps all.
        every: those whose step is a multiple of this; 0 turns the rule off.
        best: the one with the lowest validation loss, among those at whose step validation ran.
        interval: the newest one whose step is a multiple of this: a run goes back to it, however many were written
            since then because the run was stopped. 0 turns the rule off.
    """

    newest: int = 0
    every: int = 0
    best: bool = False
    interval: int = 0


def retention_of(train: TrainConfig) -> Retention:
    """What a run's settings say."""
    return Retention(train.keep_checkpoints, train.keep_every, train.keep_best, train.checkpoint_interval)


def partial_of(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _replaced(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.replaced")


def write_durably(path: Path, text: str) -> None:
    """Write a small file of a folder that has no name yet, and bring it to disk; a link is not followed.

    Raises:
        OSError: it cannot be written.
    """
    with new_file(path) as file:
        file.write(text.encode())


def remove(path: Path) -> None:
    """Remove a folder with all that is in it; of a link the link alone. What is not there needs no removal.

    Raises:
        OSError: something cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def _refuse_link(path: Path) -> None:
    """Nothing is renamed, removed or written behind a link: that may be somebody else's.

    Raises:
        OSError: it is one.
    """
    if path.is_symlink():
        raise OSError(f"{path} is a link: nothing behind it is changed")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def publish(final: Path, manifest: str) -> None:
    """Complete the checkpoint under construction with its manifest, and give it its name.

    Once it has the name it is there: what fails after that is a warning.

    Raises:
        OSError: nothing has the name then, or what had it before.
    """
    partial, replaced = partial_of(final), _replaced(final)
    for inside in partial.rglob("*"):
        if inside.is_dir():
            fsync_folder(inside)
    write_durably(partial / MANIFEST, manifest)
    fsync_folder(partial)
    if final.exists():
        remove(replaced)
        os.rename(final, replaced)
    try:
        os.rename(partial, final)
    except OSError:
        if not final.exists():
            with contextlib.suppress(OSError):
                os.rename(replaced, final)
        raise
    try:
        fsync_folder(final.parent)
        remove(replaced)
    except OSError as error:
        _warn(f"{final} is complete, but its folder could not be brought to disk or tidied: {error}")


def tidy(folder: Path) -> None:
    """Finish or undo what a killed process left. Nobody else may be writing the folder.

    What cannot be removed is a warning: nothing depends on it.

    Raises:
        OSError: a checkpoint cannot be given its name back, or the folder is a link.
        TryAgain: the disk does not say what is there.
    """
    _refuse_link(folder)
    for path in paths_in(folder, REPLACED):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if not os.path.lexists(final):
            os.rename(path, final)
    for path in paths_in(folder, r"\.step_.*\.(partial|removed|replaced)"):
        try:
            remove(path)
        except OSError as error:
            _warn(f"what a killed process left cannot be removed: {error}")


def has_checkpoints(folder: Path) -> bool:
    """Whether there is anything to continue from, damaged or not."""
    return bool(checkpoint_folders(folder) or damaged_folders(folder) or paths_in(folder, REPLACED))


def damaged_folders(folder: Path) -> list[Path]:
    """Checkpoints that were found damaged and set aside."""
    return sorted(paths_in(folder, "damaged_step_.*"))


def set_aside(checkpoint: Path, reason: str) -> Path:
    """Rename a damaged checkpoint, so that it is neither used nor counted, and leave a note inside.

    Returns:
        Its new path.

    Raises:
        OSError: it cannot be renamed, or it is a link.
    """
    for path in (checkpoint.parent, checkpoint):
        _refuse_link(path)
    target = checkpoint.with_name(f"damaged_{checkpoint.name}")
    number = 1
    while os.path.lexists(target):
        number += 1
        target = checkpoint.with_name(f"damaged_{checkpoint.name}.{number}")
    note = (
        f"This checkpoint was skipped when its run was resumed:\n{reason}\n\n"
        f"If it has been mended, rename the folder to {checkpoint.name}. Otherwise it can be deleted.\n"
    )
    with contextlib.suppress(OSError):  # a full disk must not keep it from getting out of the way
        write_durably(checkpoint / NOTE, note)
    os.rename(checkpoint, target)
    with contextlib.suppress(OSError):
        fsync_folder(target.parent)
    return target


def expendable(folder: Path, retention: Retention) -> list[Path]:
    """Checkpoints that no rule keeps, oldest first.

    One whose manifest cannot be used is none of them, and counts for no rule. So does a link.
    """
    losses: dict[Path, float | None] = {}
    for path in complete_checkpoints(folder):
        if path.is_symlink():
            continue
        try:
            losses[path] = described(path)["validation_loss"]
        except UserError:
            continue
    sound = list(losses)
    if not retention.newest:
        return []
    kept = set(sound[-retention.newest :])
    if retention.every:
        kept |= {path for path in sound if step_of(path) % retention.every == 0}
    kept |= set(of_interval(sound, retention.interval)[-1:])
    if retention.best:
        known = [(loss, -step_of(path), path) for path, loss in losses.items() if loss is not None]
        kept |= {min(known)[2]} if known else set()
    return [path for path in sound if path not in kept]


def prune(folder: Path, retention: Retention) -> None:
    """Remove what no rule keeps; a failure is a warning, as nothing depends on it."""
    try:
        _refuse_link(folder)
        found = expendable(folder, retention)
    except (OSError, UserError) as error:
        _warn(f"old checkpoints are not removed: {error}")
        return
    remove_checkpoints(found)


def of_interval(checkpoints: Iterable[Path], interval: int) -> list[Path]:
    """Those that a run which is never stopped has as well; none without an interval."""
    return [path for path in checkpoints if interval and step_of(path) % interval == 0]


def remove_checkpoints(checkpoints: Iterable[Path]) -> None:
    """Remove checkpoints; a failure is a warning, as nothing depends on it."""
    for path in checkpoints:
        removed = path.with_name(f".{path.name}.removed")
        try:
            remove(removed)
            os.rename(path, removed)
            remove(removed)
        except OSError as error:
            _warn(f"an old checkpoint cannot be removed: {error}")


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Compare what a checkpoint will take with what is free.

    Raises:
        OSError: too little.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(f"{folder}: a checkpoint takes {_size(needed_bytes)} but {_size(free)} are free")


def finite_or_none(loss: float | None) -> float | None:
    """A loss as JSON can hold it."""
    return loss if loss is not None and math.isfinite(loss) else None


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
