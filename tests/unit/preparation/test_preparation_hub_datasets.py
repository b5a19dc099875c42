"""Datasets that another package reads, on disks and networks that do not answer."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lpa import files
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.preparation import hub_datasets
from megatron_lpa.preparation.hub_datasets import dataset_source, record_batches
from megatron_lpa.preparation.sources import Source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set" / "inner").mkdir(parents=True)
    for name in ("a.parquet", "inner/b.parquet", ".hidden"):
        (tmp_path / "set" / name).write_text(name)
    (tmp_path / "set" / "nowhere").symlink_to("gone")
    return tmp_path / "set"


def wrapped(cause: Exception) -> Exception:
    """What a library makes of an error."""
    error = RuntimeError("An error occurred while generating the dataset")
    error.__cause__ = cause
    return error


def raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> UserError:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    with pytest.raises(UserError, match="dataset 'name', split 'train': ") as caught:
        list(record_batches(Source("name", "dataset", split="train"), ("text",), 10))
    return caught.value


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EMFILE, errno.ECONNREFUSED])
def test_what_may_be_gone_is_tried_again(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(number, "trouble"), wrapped(OSError(number, "trouble"))):
        found = raised(error, monkeypatch)
        assert isinstance(found, TryAgain) and found.exit_code == 1


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"), PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError("Couldn't find the dataset"), ValueError("Unknown split"),
        wrapped(KeyError("text")),
    ],
    ids=repr,
)  # fmt: skip
def test_what_lasts_is_told_to_the_user(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    found = raised(error, monkeypatch)
    assert not isinstance(found, TryAgain) and found.exit_code == 78


@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_a_folder_is_asked_for_again(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))
    expected = dataset_source(str(folder), None, "train").revision
    real, failures = getattr(os, call), [errno.EIO]

    def failing(path: Any, *more: Any, **named: Any) -> Any:
        # Not at the first look at the folder, which always was patient.
        if failures and str(path).endswith(("b.parquet", "inner")):
            raise OSError(failures.pop(), "Input/output error", str(path))
        return real(path, *more, **named)

    monkeypatch.setattr(os, call, failing)
    assert dataset_source(str(folder), None, "train").revision == expected
    assert not failures
    failures += [errno.EIO] * 4
    with pytest.raises(TryAgain, match="cannot be read"):
        dataset_source(str(folder), None, "train")


def test_the_state_of_a_folder_is_that_of_its_files(folder: Path) -> None:
    first = hub_datasets._state_of(folder)
    (folder / "empty").mkdir()
    assert hub_datasets._state_of(folder) == first
    (folder / "inner" / "c.parquet").touch()
    assert hub_datasets._state_of(folder) != first
    assert hub_datasets._state_of(folder / "a.parquet") == hub_datasets._state_of(folder / "empty")
