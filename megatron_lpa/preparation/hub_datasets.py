"""Datasets that the package ``datasets`` reads: from the Hugging Face hub, or from a local folder."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lpa.errors import TryAgain, UserError, causes
from megatron_lpa.files import LASTING, exists, from_disk, status
from megatron_lpa.preparation.sources import Source


def dataset_source(name: str, config: str | None, split: str) -> Source:
    """A source for one split of a dataset.

    Args:
        name: a hub name, a folder that ``datasets`` can load, or one that its ``save_to_disk`` wrote.
        config: configuration of the dataset, where it has several.
        split: which split to read, as ``train``.
    """
    return Source(name, "dataset", config=config, split=split, revision=_revision(name))


def _revision(name: str) -> str | None:
    """What tells one state of the dataset from another; ``None`` where the hub cannot be asked."""
    folder = Path(name)
    if exists(folder):
        return from_disk(lambda: _state_of(folder), folder)
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # the client raises errors of many libraries; reading will say what is wrong
        return None


def _state_of(folder: Path) -> str:
    """A hash over the names, sizes and dates of a folder's files. One attempt."""
    digest = hashlib.sha256()
    for path in sorted(
        Path(name, file) for name, _, files in os.walk(folder, onerror=_raise) for file in files
    ):
        found = status(path)
        if found is not None and stat.S_ISREG(found.st_mode):
            digest.update(f"{path.relative_to(folder)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _raise(error: OSError) -> None:
    if not isinstance(error, NotADirectoryError):  # a file, which has none inside
        raise error


def record_batches(source: Source, columns: tuple[str, ...], rows: int) -> Iterator[Any]:
    """Streams ``pyarrow.RecordBatch`` of at most ``rows`` rows with those of ``columns`` that exist.

    Raises:
        UserError: ``datasets`` cannot give this dataset.
        TryAgain: a disk or the network does not answer.
    """
    import datasets  # here: it takes a second, which reading files should not pay

    try:
        dataset = _open(datasets, source)
        names = dataset.column_names
        if names is not None:  # a stream may not know its columns
            dataset = dataset.select_columns([name for name in columns if name in names])
        for table in dataset.with_format("arrow").iter(batch_size=rows):
            yield from table.to_batches()
    except UserError:
        raise
    except Exception as error:  # datasets and the hub's client raise errors of many libraries
        kind = TryAgain if _may_be_gone(error) else UserError
        raise kind(
            f"dataset {source.name!r}, split {source.split!r}: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0][:300]}; check the name, --dataset-config and "
            "--dataset-split, and for a name on the hub the network"
        ) from error


def _may_be_gone(error: BaseException) -> bool:
    """Whether the system said something that does not last, behind whatever a library made of it."""
    # Without a number it is a library's own.
    numbers = (
        cause.errno for cause in causes(error) if isinstance(cause, OSError) and cause.errno is not None
    )
    return next((number not in LASTING for number in numbers), False)


def _open(datasets: Any, source: Source) -> Any:
    if any(exists(Path(source.name) / saved) for saved in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(source.name)
        if isinstance(saved, datasets.DatasetDict):
            if source.split not in saved:
                raise UserError(
                    f"{source.name}: no split {source.split!r}; it has {', '.join(saved)}: choose with "
                    "--dataset-split"
                )
            saved = saved[source.split]
        elif saved.split is not None and str(saved.split) != source.split:
            raise UserError(
                f"{source.name}: holds the split {saved.split}, not {source.split!r}; choose with "
                "--dataset-split"
            )
        return saved
    revision = None if exists(source.name) else source.revision
    return datasets.load_dataset(
        source.name, source.config, split=source.split, streaming=True, revision=revision
    )
