"""What the manifest of a dataset may say in words: nothing that fills a screen or passes for a line of its
own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.token_datasets import random_documents, write_dataset

from megatron_lpa.data.storage.dataset_manifest import read_manifest
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.preprocess_config import PreprocessConfig, check_options
from megatron_lpa.preparation.sources import resolve_inputs

LONG = "x" * 100_000
FORGED = "a\nerror: b"


def put(content: dict[str, Any], place: tuple[str | int, ...], value: Any) -> None:
    inner: Any = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value


def refused(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    prefix = write_dataset(folder / "data", random_documents(0, 20))
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"data\.json: a damaged manifest") as caught:
        read_manifest(prefix)
    return str(caught.value)


TEXTS: list[tuple[str | int, ...]] = [
    ("tokenizer", "name"), ("tokenizer", "fingerprint"), ("dtype",), ("json_key",), ("version",), ("job",),
    ("sources", 0, "path"), ("sources", 0, "sha256"), ("sources", 0, "config"), ("sources", 0, "split"),
    ("sources", 0, "revision"),
]  # fmt: skip
NAMES: list[tuple[str | int, ...]] = [
    ("keep_subsets",),
    ("drop_subsets",),
    ("subsets", FORGED),
    ("dropped_subsets", FORGED),
]


@pytest.mark.parametrize("text", [FORGED, "\x1b[2J", "a\u2028b", "\x9b1m", LONG])
@pytest.mark.parametrize("place", TEXTS, ids=lambda place: ".".join(map(str, place)))
def test_no_text_makes_a_second_line_or_fills_a_screen(
    tmp_path: Path, place: tuple[str | int, ...], text: str
) -> None:
    message = refused(tmp_path, lambda content: put(content, place, text))
    assert message.isprintable() and len(message) < 700 + len(str(tmp_path))
    assert str(place[-1]) in message


@pytest.mark.parametrize("place", NAMES, ids=lambda place: str(place[0]))
def test_no_name_of_a_subset_makes_a_second_line(tmp_path: Path, place: tuple[str | int, ...]) -> None:
    values = {"subsets": {"documents": 1, "tokens": 1}, "dropped_subsets": 1}
    message = refused(tmp_path, lambda content: put(content, place, values.get(str(place[0]), [FORGED])))
    assert message.isprintable() and str(place[0]) in message


@pytest.mark.parametrize(
    "change",
    [
        {"documents": LONG},
        {"append_eod": LONG},
        {"shard": [LONG]},
        {"keep_subsets": LONG},
        {"subsets": {LONG: {"documents": -1, "tokens": 1}}},
        {"dropped_subsets": {LONG: -1}},
        {"tokenizer": {LONG: 1}},
        {LONG: 1},
    ],
    ids=lambda change: next(iter(change))[:20],
)
def test_a_value_is_shown_by_its_beginning(tmp_path: Path, change: dict[str, Any]) -> None:
    message = refused(tmp_path, lambda content: content.update(change))
    assert message.isprintable() and len(message) < 700 + len(str(tmp_path))


def test_long_names_of_subsets_are_as_records_have_them(tmp_path: Path) -> None:
    prefix = write_dataset(
        tmp_path / "data", random_documents(0, 20), change=lambda m: replace(m, dropped_subsets={LONG: 2})
    )
    found = read_manifest(prefix)
    assert found is not None and found.dropped_subsets == {LONG: 2}


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": FORGED}, {"dataset": FORGED}, {"dataset_config": FORGED}, {"dataset_split": FORGED},
        {"json_keys": (FORGED,)}, {"keep_subsets": (FORGED,)}, {"drop_subsets": (FORGED,)},
    ],
)  # fmt: skip
def test_preprocessing_refuses_before_it_works_what_its_manifest_could_not_say(
    change: dict[str, Any],
) -> None:
    with pytest.raises(UserError, match="has no place; give another name") as caught:
        check_options(replace(PreprocessConfig("out", "tok"), **change))
    assert str(caught.value).isprintable()


def test_preprocessing_refuses_a_file_that_no_manifest_could_name(tmp_path: Path) -> None:
    (tmp_path / "a\nb.txt").write_text("text")
    with pytest.raises(UserError, match=r"has no place.*; rename it") as caught:
        resolve_inputs([str(tmp_path)])
    assert str(caught.value).isprintable()
