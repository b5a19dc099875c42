"""``docs/api.md``: it lists what is public, and its examples run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.token_datasets import random_documents, write_dataset

import megatron_lpa

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
SECTIONS = dict(part.split("`\n", 1) for part in re.split(r"^### `", PAGE, flags=re.MULTILINE)[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def test_the_page_lists_what_is_public_once() -> None:
    assert re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE) == list(SECTIONS)
    assert sorted(SECTIONS) == sorted(megatron_lpa.__all__) == sorted(set(megatron_lpa.__all__))
    assert not {*megatron_lpa.__all__} - {*dir(megatron_lpa)}


def test_what_is_not_public_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'megatron_lpa' has no attribute 'load_runs'"):
        megatron_lpa.load_runs  # noqa: B018
    with pytest.raises(ImportError):
        from megatron_lpa import load_runs  # noqa: F401


@pytest.mark.parametrize("name", SECTIONS)
def test_a_sentence_and_an_example_that_runs(
    name: str,
    folder: Path,
    save_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    if not (folder / "runs").exists():
        run = save_run(folder / "runs" / "tiny-lpa")
        (run / "metrics.jsonl").write_text(
            '{"kind": "train", "step": 20, "tokens": 9, "loss": 1.25, "step_ms": 1.0}\n'
        )
        documents = [[token % 300 for token in document] for document in random_documents(0, 5)]
        (folder / "data").mkdir()
        write_dataset(folder / "data" / "corpus_text_document", documents)
    sentence, code, after = re.fullmatch(
        r"\n(.*?)\n\n```python\n(.*?)```\n(.*)", SECTIONS[name], re.DOTALL
    ).groups()  # type: ignore[union-attr]
    assert sentence.endswith(".") and "\n\n" not in sentence
    assert "```" not in after and re.search(rf"\b{name}\b", code)
    exec(compile(code, f"docs/api.md: {name}", "exec"), {})
    if "print(" in code and name != "validate_config":
        assert capsys.readouterr().out
