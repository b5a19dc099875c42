"""The ``checkpoints`` folder of a run: what appears there, what goes, and what a killed process leaves.

Names change by single renames, so that every folder called ``step_NNNNNNNN`` is a whole checkpoint or was
damaged from outside. What is on its way in or out has a name of its own:

| name | what it is | what ``tidy`` does with it |
|---|---|---|
| ``.step_NNNNNNNN.partial`` | being written | removes it |
| ``.step_NNNNNNNN.removed`` | being removed | removes it |
| ``.step_NNNNNNNN.replaced`` | an older one of the same step, until the new one has its name | gives it its name back if that is free |
| ``damaged_step_NNNNNNNN`` | found damaged and skipped, with a note inside | nothing |
| ``passed_step_NNNNNNNN`` | written after the one that the run went back to, and kept by a rule | nothing |
"""  # noqa: E501

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lpa.checkpoint.manifest import checkpoint_folders, complete_checkpoints, described, paths_in
from megatron_lpa.checkpoint.progress import due_at
from megatron_lpa.config import TrainConfig
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import exists, fsync_folder, is_link, patiently, refuse_link, status, write_whole
from megatron_lpa.run_folder import DAMAGE_NOTE, DAMAGED, MANIFEST, PASSED, STEP, step_of

logger = logging.getLogger(__name__)

REPLACED = rf"\.{STEP}.*\.replaced"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is complete; those that any rule names do.

    Args:
        newest: how many of the newest; 0 keeps all.
        every: those whose step is a multiple of this; 0 turns the rule off.
        best: the one with the lowest validation loss, among those at whose step validation ran.
        interval: that of the run today. The newest one that was due at its interval when it was written
            stays: a run goes back to it, however many were written since then because the run was stopped.
                Manifests of earlier
            versions do not say; there a multiple of this is taken for due.
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


def remove(path: Path) -> None:
    """Remove a folder with all that is in it; of a link the link alone. What is not there needs no removal.

    Raises:
        OSError: something cannot be removed.
        TryAgain: the disk does not say what it is.
    """
    found = status(path, follow_links=False)
    if found is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def _own(path: Path) -> None:
    """Nothing is renamed, removed or written behind a link. Raises as ``files.refuse_link``."""
    refuse_link(path, "and nothing behind it is changed; put what it leads to in its place")


def _warn(message: str) -> None:
    logger.warning(message)


def fsync_tree(folder: Path) -> None:
    """Make the names in a folder, and in its folders, survive a power cut. Links are not followed.

    Raises:
        OSError: the disk failed.
        TryAgain: it does not list a folder.
    """

    def failed(error: OSError) -> None:
        raise error

    # Listing is tried again, fsync is not: one that failed may have dropped what a second one then calls
    # written.
    for inside in patiently(lambda: [path for path, _, _ in os.walk(folder, onerror=failed)], folder):
        fsync_folder(inside)


def publish(final: Path, manifest: str) -> None:
    """Complete the checkpoint under construction with its manifest, and give it its name.

    Once it has the name it is there: what fails after that is a warning.

    Raises:
        OSError: nothing has the name then, or what had it before.
        TryAgain: likewise; the disk does not say whether something has the name.
    """
    partial, replaced = partial_of(final), _replaced(final)
    write_whole(partial / MANIFEST, manifest)
    fsync_tree(partial)
    if exists(final):
        remove(replaced)
        os.rename(final, replaced)
    try:
        os.rename(partial, final)
    except OSError:
        with contextlib.suppress(OSError, UserError):
            if not exists(final):
                os.rename(replaced, final)
        raise
    try:
        fsync_folder(final.parent)
        remove(replaced)
    except (OSError, UserError) as error:
        _warn(f"{final} is complete, but its folder could not be brought to disk or tidied: {error}")


def give_names_back(folder: Path) -> None:
    """Undo what a process that was killed while it replaced a checkpoint has left. Nothing else is changed.

    Raises:
        UnusableFile: the folder is a link.
        OSError: a checkpoint cannot be given its name back.
        TryAgain: the disk does not say what is there.
    """
    _own(folder)
    for path in paths_in(folder, REPLACED):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if status(final, follow_links=False) is None:
            os.rename(path, final)


def tidy(folder: Path) -> None:
    """Finish or undo what a killed process left. Nobody else may be writing the folder.

    What cannot be removed is a warning: nothing depends on it.

    Raises:
        UnusableFile: the folder is a link.
        OSError: a checkpoint cannot be given its name back.
        TryAgain: the disk does not say what is there.
    """
    give_names_back(folder)
    for path in paths_in(folder, rf"\.{STEP}.*\.(partial|removed|replaced)"):
        try:
            remove(path)
        except (OSError, UserError) as error:
            _warn(f"what a killed process left cannot be removed: {error}")


def has_checkpoints(folder: Path) -> bool:
    """Whether there is anything to continue from, damaged or not."""
    return bool(checkpoint_folders(folder) or damaged_folders(folder) or paths_in(folder, REPLACED))


def damaged_folders(folder: Path) -> list[Path]:
    """Checkpoints that were found damaged and set aside."""
    return sorted(paths_in(folder, f"{DAMAGED}{STEP}.*"))


def set_aside(checkpoint: Path, reason: str) -> Path:
    """Rename a damaged checkpoint, so that it is neither used nor counted, and leave a note inside.

    Returns:
        Its new path.

    Raises:
        OSError: it cannot be renamed.
        UnusableFile: it is a link, or in one.
        TryAgain: the disk does not answer.
    """
    for path in (checkpoint.parent, checkpoint):
        _own(path)
    note = (
        f"This checkpoint was skipped when its run was resumed:\n{reason}\n\n"
        f"If it has been mended, rename the folder to {checkpoint.name}. Otherwise it can be deleted.\n"
    )
    with contextlib.suppress(OSError):  # a full disk must not keep it from getting out of the way
        write_whole(checkpoint / DAMAGE_NOTE, note)
    return _renamed(checkpoint, DAMAGED)


def _renamed(checkpoint: Path, why: str) -> Path:
    """``WHY_step_NNNNNNNN``, which nothing loads, counts or removes; with a number where that name is
    taken."""
    target = checkpoint.with_name(f"{why}{checkpoint.name}")
    number = 1
    while status(target, follow_links=False) is not None:
        number += 1
        target = checkpoint.with_name(f"{why}{checkpoint.name}.{number}")
    os.rename(checkpoint, target)
    with contextlib.suppress(OSError):
        fsync_folder(target.parent)
    return target


def _sound(folder: Path) -> dict[Path, dict[str, Any]]:
    """Checkpoints whose manifests can be used, oldest first, and what these say. No links."""
    found = {}
    for path in complete_checkpoints(folder):
        with contextlib.suppress(UserError):
            if not is_link(path):
                found[path] = described(path)
    return found


def _named(sound: dict[Path, dict[str, Any]], retention: Retention) -> dict[Path, str]:
    """Checkpoints that are kept whatever comes later, and the setting that says so."""
    if not retention.newest:
        return dict.fromkeys(sound, "train.keep_checkpoints=0")
    named = {}
    known = [(said["validation_loss"], -step_of(path), path) for path, said in sound.items()]
    known = [entry for entry in known if entry[0] is not None]
    if retention.best and known:
        named[min(known)[2]] = "train.keep_best"
    for path in sound:
        if retention.every and step_of(path) % retention.every == 0:
            named[path] = f"train.keep_every={retention.every}"
    return named


def expendable(folder: Path, retention: Retention) -> list[Path]:
    """Checkpoints that no rule keeps, oldest first.

    One whose manifest cannot be used is none of them, and counts for no rule. So does a link.
    """
    sound = _sound(folder)
    due = [path for path, said in sound.items() if _was_due(path, said, retention.interval)]
    kept = {*list(sound)[-retention.newest :], *due[-1:], *_named(sound, retention)}
    return [path for path in sound if path not in kept]


def prune(folder: Path, retention: Retention) -> None:
    """Remove what no rule keeps; a failure is a warning, as nothing depends on it."""
    try:
        _own(folder)
        found = expendable(folder, retention)
    except (OSError, UserError) as error:
        _warn(f"old checkpoints are not removed: {error}")
        return

    for path in found:
        try:
            _remove_checkpoint(path)
        except (OSError, UserError) as error:
            _warn(f"an old checkpoint cannot be removed: {error}")


def _was_due(checkpoint: Path, said: dict[str, Any], interval: int) -> bool:
    """Whether it was due at its interval when it was written; by today's where its manifest does not say."""
    return bool(said.get("at_interval", due_at(step_of(checkpoint), interval)))


def to_go_back_to(folder: Path, interval: int) -> list[Path]:
    """Checkpoints, those that are to be tried first last: the newest that were due at their interval, then
    the newest.

    Args:
        folder: the run's ``checkpoints``.
        interval: that of the run today, for manifests that do not say.

    Raises:
        TryAgain, UserError: as ``checkpoint_folders``; the disk does not give a manifest.
    """

    def rank(path: Path) -> tuple[bool, int]:
        try:
            said = described(path)
        except TryAgain:
            raise
        except UserError:  # whoever loads it tells why it cannot be used
            said = {}
        return _was_due(path, said, interval), step_of(path)

    return sorted(checkpoint_folders(folder), key=rank)


def pass_over(folder: Path, step: int, retention: Retention) -> list[str]:
    """Get what is later than ``step`` out of the way of the next start, which would go on from it.

    What a rule keeps for good, or cannot be used as it is, becomes ``passed_step_NNNNNNNN``; the rest is
    removed.

    Returns:
        For the user: what became of each, also where that failed.

    Raises:
        TryAgain, UserError: as ``checkpoint_folders``; the folder is a link.
    """
    _own(folder)
    sound = _sound(folder)
    named = _named(sound, retention)
    notes = []
    # The newest first: of a process that is killed amid this, the next start goes on from the earliest left.
    for path in reversed(checkpoint_folders(folder)):
        if step_of(path) <= step:
            continue
        kept = f"{named[path]} keeps it" if path in named else "its manifest cannot be used"
        try:
            if path in named or path not in sound:
                target = _renamed(path, PASSED)
                notes.append(f"{path.name} is now {target.name}: the run goes back behind it, and {kept}")
            else:
                _remove_checkpoint(path)
                notes.append(f"{path.name} is removed: the run goes back behind it, and no rule keeps it")
        except (OSError, UserError) as error:
            notes.append(
                f"{path.name} cannot be got out of the way ({error}): the next start goes on from it"
            )
    return notes


def _remove_checkpoint(path: Path) -> None:
    removed = path.with_name(f".{path.name}.removed")
    remove(removed)
    os.rename(path, removed)
    remove(removed)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Compare what a checkpoint will take with what is free.

    Raises:
        OSError: too little.
        TryAgain: the disk does not say.
    """
    free = patiently(lambda: shutil.disk_usage(folder).free, folder)
    if free < needed_bytes:
        raise OSError(f"{folder}: a checkpoint takes {_size(needed_bytes)} but {_size(free)} are free")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
