"""Where raw text comes from: files, folders, patterns, and datasets that the package ``datasets`` reads."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from megatron_lpa.data.storage.dataset_manifest import why_unfit
from megatron_lpa.errors import UserError
from megatron_lpa.files import exists, from_disk, is_dir, is_file, kind_of, status
from megatron_lpa.preparation.patterns import files_matching

logger = logging.getLogger(__name__)

LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
SUFFIXES = (*LINES, ".parquet", ".txt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# What a download leaves while it is under way, and text that only looks as if it were read.
_UNREADABLE = (
    *(".part", ".tmp", ".aria2", ".crdownload", ".incomplete", ".download"),
    *(".ndjson", ".jsonlines", ".xz", ".bz2", ".lz4", ".txt.gz", ".txt.zst"),
)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """One thing to read from start to end.

    Args:
        name: the path, or the name of a dataset for ``datasets``.
        kind: ``lines`` of JSON, a ``text`` file that is one document, ``parquet``, or ``dataset``.
        size_bytes: on disk; 0 for a dataset.
        mtime_ns: when the file was last changed; 0 for a dataset.
        config: configuration of a dataset.
        split: split of a dataset.
        revision: of a dataset: the hub's commit, or a hash over a local folder's files.
    """

    name: str
    kind: Literal["lines", "text", "parquet", "dataset"]
    size_bytes: int = 0
    mtime_ns: int = 0
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.name)


def resolve_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files that paths, folders and glob patterns name, in the order given, each expanded and sorted.

    Folders are searched to any depth, links to folders included, for the endings in ``SUFFIXES``, in either
    case. Passed over there are hidden files, files of a tokenizer, and what preprocessing writes.

    Raises:
        UserError: nothing matches, an ending is unknown, a file is named twice, a name is not UTF-8, a folder
            cannot be read, or a link in it leads nowhere.
    """
    files: list[Path] = []
    for name in inputs:
        if not name.strip():
            raise UserError(f"an input is {name!r}, an empty name; give a file, a folder or a pattern")
        path = Path(name)
        if is_dir(path):
            if any(exists(path / saved) for saved in ("dataset_dict.json", "state.json")):
                raise UserError(
                    f"{name}: a folder that datasets' save_to_disk wrote; give it as --dataset {name}"
                )
            found = from_disk(partial(_sorted_texts, path), path)
            if not found:
                raise UserError(f"{name}: no text in this folder; known endings: {', '.join(SUFFIXES)}")
        elif (there := status(path)) is not None:
            if not stat.S_ISREG(there.st_mode):
                raise UserError(
                    f"{name}: {kind_of(there.st_mode)}, not a regular file; write the text to a file, as a "
                    "run that was killed reads it again"
                )
            found = [path]
        else:
            found = [Path(path) for path in files_matching(name)]
            if not found:
                raise UserError(
                    f"{name}: no such file, and no file matches it; check the path or the pattern"
                )
        files += found
    seen: set[tuple[int, int]] = set()  # also a link of either kind is the same text
    for file in files:
        if not _ends_as_text(file):
            raise UserError(f"{file}: unknown ending; known: {', '.join(SUFFIXES)}")
        if reason := why_unfit(str(file)):
            raise UserError(
                f"input {str(file)!r}: a name {reason}, and the manifest has to list it; rename it"
            )
        found_file = from_disk(file.stat, file)
        if (found_file.st_dev, found_file.st_ino) in seen:
            raise UserError(f"{file}: named twice, so its text would be there twice; name it once")
        seen.add((found_file.st_dev, found_file.st_ino))
    return files


def file_sources(inputs: Sequence[str]) -> list[Source]:
    """What :func:`resolve_inputs` finds, with what is known of each file.

    Raises:
        UserError: as :func:`resolve_inputs`, or a file cannot be read.
    """
    sources = []
    for path in resolve_inputs(inputs):
        found = from_disk(path.stat, path)
        sources.append(Source(str(path), _kind(path), found.st_size, found.st_mtime_ns))
    return sources


def shard_of(items: Sequence[Item], shard: int, num_shards: int) -> list[Item]:
    """Neighbouring items for one of ``num_shards`` tasks, counted from 0; all shards in order give all items.

    Raises:
        UserError: there is no such shard, or there are fewer items than shards.
    """
    if num_shards < 1 or not 0 <= shard < num_shards:
        raise UserError(
            f"shard {shard} of {num_shards}: shards count from 0, so give 0/{num_shards} to "
            f"{num_shards - 1}/{num_shards}"
        )
    if num_shards > len(items):
        raise UserError(
            f"{num_shards} shards, but only {len(items)} input files; give at most one shard per file"
        )
    return list(items[shard * len(items) // num_shards : (shard + 1) * len(items) // num_shards])


def _kind(path: Path) -> Literal["lines", "text", "parquet"]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return "parquet"
    return "text" if name.endswith(".txt") else "lines"


def _ends_as_text(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _sorted_texts(folder: Path) -> list[Path]:
    return sorted(_texts_of_folder(folder))


def _texts_of_folder(folder: Path) -> Iterator[Path]:
    """The files of text in a folder and those inside it. ``Path.rglob`` would pass over links and closed
    folders.

    Raises:
        UserError: a file or link is not to be read.
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    visited: set[Path] = set()  # links can lead in a circle
    passed_over: list[Path] = []
    for name, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(name).resolve()
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        for path in (Path(name, file) for file in files):
            if not _is_text_of_folder(path):
                if path.name.lower().endswith(_UNREADABLE):
                    raise UserError(
                        f"{path}: unfinished, or text of a kind that cannot be read; finish, convert, rename "
                        f"or remove it, or name the files to be read. Known endings: {', '.join(SUFFIXES)}"
                    )
                if not path.name.startswith(".") and not _ends_as_text(path):
                    passed_over.append(path)
                continue
            if path.is_symlink() and not exists(path):
                raise UserError(f"{path}: a link that leads nowhere; mend or remove it")
            if is_file(path):
                yield path
    if passed_over:
        logger.info(
            f"note: {len(passed_over)} files in {folder} are no text by their endings and are passed over, "
            f"such as {passed_over[0].name}"
        )


def _is_text_of_folder(path: Path) -> bool:
    if path.name.startswith(".") or not _ends_as_text(path):
        return False
    if path.name in _TOKENIZER_FILES or path.name.endswith(".rejected.jsonl"):
        return False
    return not (path.suffix == ".json" and exists(path.with_suffix(".idx")))  # a dataset's manifest
