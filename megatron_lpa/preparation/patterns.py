"""Patterns of the shell (``*``, ``?``, ``[abc]``, ``**``) by which inputs are named.

Python's ``glob`` takes a folder that the disk does not give for an empty one: what lies in it would be
missing from a dataset without a word.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator

from megatron_lpa.files import is_dir, is_file, names_in, status


def files_matching(pattern: str) -> list[str]:
    """The files that fit, in order: those that ``glob.glob(pattern, recursive=True)`` finds where the disk
    answers.

    ``**`` stands for folders to any depth. Links to folders are entered, but for those that lead in a circle.
    Names that begin with a point fit only a part of the pattern that does.

    Raises:
        UserError: a folder may not be read.
        TryAgain: the disk does not give a folder.
    """
    parts = [part for part in pattern.split("/") if part]
    if not parts or pattern.endswith("/"):
        return []
    return sorted(set(_below("/" if pattern.startswith("/") else "", parts)))


def _below(folder: str, parts: list[str]) -> Iterator[str]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        for inside in _folders(folder, ()):
            yield from _below(inside, rest or ["*"])
        return
    for name in _seen(folder, part) if glob.has_magic(part) else [part]:
        path = os.path.join(folder, name)
        if not rest:
            if is_file(path):
                yield path
        elif is_dir(path):
            yield from _below(path, rest)


def _folders(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """The folder and all below it."""
    found = status(folder or os.curdir)
    if found is None or (found.st_dev, found.st_ino) in above:
        return
    yield folder
    for name in _seen(folder, "*"):
        path = os.path.join(folder, name)
        if is_dir(path):
            yield from _folders(path, (*above, (found.st_dev, found.st_ino)))


def _seen(folder: str, pattern: str) -> list[str]:
    hidden = pattern.startswith(".")
    names = fnmatch.filter(names_in(folder or os.curdir), pattern)
    return [name for name in names if hidden or not name.startswith(".")]
