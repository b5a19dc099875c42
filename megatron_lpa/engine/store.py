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

import json
import math
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_lpa.engine.manifest import (
    MANIFEST,
    checkpoint_folders,
    complete_checkpoints,
    step_of,
)
from megatron_lpa.files import fsync_folder

NOTE = "DAMAGED.txt"


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


def partial_of(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _replaced(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.replaced")


def write_durably(path: Path, text: str) -> None:
    """Write a small file and bring it to disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def publish(final: Path, manifest: str) -> None:
    """Complete the checkpoint under construction with its manifest, and give it its name.

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
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(partial, final)
    fsync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Finish or undo what a killed process left. Nobody else may be writing the folder.

    Raises:
        OSError: something cannot be renamed or removed.
    """
    for path in folder.glob(".step_*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists():
            os.rename(path, final)
    for ending in ("partial", "removed", "replaced"):
        for path in folder.glob(f".step_*.{ending}"):
            shutil.rmtree(path)


def has_checkpoints(folder: Path) -> bool:
    """Whether there is anything to continue from, damaged or not."""
    return bool(checkpoint_folders(folder) or damaged_folders(folder) or [*folder.glob(".step_*.replaced")])


def damaged_folders(folder: Path) -> list[Path]:
    """Checkpoints that were found damaged and set aside."""
    return sorted(folder.glob("damaged_step_*"))


def set_aside(checkpoint: Path, reason: str) -> Path:
    """Rename a damaged checkpoint, so that it is neither used nor counted, and leave a note inside.

    Returns:
        Its new path.

    Raises:
        OSError: it cannot be renamed.
    """
    target = checkpoint.with_name(f"damaged_{checkpoint.name}")
    number = 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"damaged_{checkpoint.name}.{number}")
    note = (
        f"This checkpoint was skipped when its run was resumed:\n{reason}\n\n"
        f"If it has been mended, rename the folder to {checkpoint.name}. Otherwise it can be deleted.\n"
    )
    write_durably(checkpoint / NOTE, note)
    os.rename(checkpoint, target)
    fsync_folder(target.parent)
    return target


def expendable(folder: Path, retention: Retention) -> list[Path]:
    """Checkpoints that no rule keeps, oldest first.

    One whose manifest cannot be read is none of them, and counts for no rule.
    """
    losses: dict[Path, float | None] = {}
    for path in complete_checkpoints(folder):
        try:
            losses[path] = json.loads((path / MANIFEST).read_text())["validation_loss"]
        except (OSError, ValueError, KeyError, TypeError):
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
    """Remove what no rule keeps."""
    remove(expendable(folder, retention))


def of_interval(checkpoints: Iterable[Path], interval: int) -> list[Path]:
    """Those that a run which is never stopped has as well; none without an interval."""
    return [path for path in checkpoints if interval and step_of(path) % interval == 0]


def remove(checkpoints: Iterable[Path]) -> None:
    """Remove checkpoints; a failure is a warning, as nothing depends on it."""
    for path in checkpoints:
        removed = path.with_name(f".{path.name}.removed")
        try:
            shutil.rmtree(removed, ignore_errors=True)
            os.rename(path, removed)
            shutil.rmtree(removed)
        except OSError as error:
            print(f"warning: an old checkpoint cannot be removed: {error}", file=sys.stderr, flush=True)


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
