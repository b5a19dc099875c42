"""Which dataset was meant by a prefix that is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.token_datasets import random_documents, write_dataset

from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("own_text_document", "own_title_document", "pile_text_document"):
        write_dataset(folder / name, random_documents(0, 3), manifest=False)
    (folder / "own.jsonl").write_text("{}\n")
    return folder


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("own", "did you mean {0}/own_text_document or {0}/own_title_document?"),
        ("pile_text_documen", "did you mean {0}/pile_text_document?"),
        ("pil_text_document", "did you mean {0}/pile_text_document?"),
        ("", "did you mean {0}/own_text_document or {0}/own_title_document or {0}/pile_text_document?"),
        ("own.jsonl", "{0}/own.jsonl is text: make a dataset of it with tools/preprocess_data.py"),
        ("other", "give the prefix of a dataset that tools/preprocess_data.py wrote"),
        ("none/own", "give the prefix of a dataset that tools/preprocess_data.py wrote"),
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_prefix_that_is_none_names_those_near_by(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: str, advice: str, relative: bool
) -> None:
    monkeypatch.chdir(folder.parent)
    shown = "data" if relative else str(folder)
    prefix = f"{shown}/{given}" if given else shown
    with pytest.raises(UserError) as error:
        IndexedDataset(prefix)
    assert f"{prefix}.idx: no such file; {advice.format(shown)}" in str(error.value)


def test_in_the_folder_that_one_is_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"did you mean pile_text_document\?"):
        IndexedDataset("pile")
