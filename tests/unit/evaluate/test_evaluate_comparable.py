"""Which losses a report lets one compare, against the text itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.preprocessing import run_tool

from megatron_lpa.commands import plot_curves
from megatron_lpa.config import DataConfig
from megatron_lpa.data.splits import open_splits
from megatron_lpa.data.tokenizers.opening import load_tokenizer
from megatron_lpa.evaluate.comparable import WAY_OUT, text_bytes
from megatron_lpa.evaluate.run_report import NOT_COMPARABLE, report_text, summarize
from megatron_lpa.preparation.bpe import train_tokenizer

SaveRun = Callable[..., Path]
S, SPLIT = 16, "70,20,10"


@pytest.fixture(scope="module")
def data(documents: list[str], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text as ``large`` and ``small``, by tokenizers of those names, and another text as
    ``other``."""
    folder = tmp_path_factory.mktemp("data")
    texts = {"a": documents, "b": documents[::-1]}
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    train_tokenizer([str(folder / "a.jsonl")], 270, str(folder / "small"))
    shutil.copytree(tokenizer_folder, folder / "large")
    for text, tokenizer, name in (("a", "large", "large"), ("a", "small", "small"), ("b", "large", "other")):
        done = run_tool(
            "--input", folder / f"{text}.jsonl", "--tokenizer", folder / tokenizer, "--append-eod",
            "--output-prefix", folder / f"of-{name}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


def prefix(data: Path, name: str) -> str:
    return str(data / f"of-{name}_text_document")


def run_of(save_run: SaveRun, folder: Path, data: Path, name: str, loss: float = 3.0, **more: Any) -> Path:
    """A run with a validation of all of its split, and its facts as a checkpoint has them."""
    config = DataConfig(prefix=prefix(data, name), split=more.pop("split", SPLIT))
    splits = open_splits(config, S, seed=1234)
    assert splits.valid is not None
    made = save_run(
        folder, data=config, tokenizer=str(data / ("small" if name == "small" else "large")), facts=splits.train.facts()  # noqa: E501
    )  # fmt: skip
    shutil.copytree(data / ("small" if name == "small" else "large"), made / "tokenizer")
    tokens = more.pop("tokens", splits.valid.num_samples * S)
    records = [
        {"kind": "train", "step": 20, "tokens": 2560, "loss": 2.0, "step_ms": 1.0},
        {"kind": "valid", "step": 20, "tokens": 2560, "loss": loss, "tokens_evaluated": tokens},
    ]
    (made / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


def reported(*runs: Path) -> tuple[dict[str, list[str]], list[str]]:
    text = report_text([summarize(run) for run in runs], "loss.png", ())
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    notes = [line for line in text.splitlines() if line.startswith("**Note:**")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}, notes


def bytes_by_hand(data: Path, name: str) -> int:
    """Of what the validation predicts, document by document."""
    tokenizer = load_tokenizer(str(data / ("small" if name == "small" else "large")))
    valid = open_splits(DataConfig(prefix=prefix(data, name), split=SPLIT), S, seed=1234).valid
    assert valid is not None
    rows = valid.read(valid.in_order(np.arange(valid.num_samples)))
    pieces: list[list[int]] = [[]]
    for token in rows[:, 1:].ravel().tolist():
        if token == tokenizer.eod_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return sum(len(tokenizer.decode(piece).encode()) for piece in pieces)


def test_labels_that_are_left_out_are_said(tmp_path: Path, save_run: SaveRun, data: Path) -> None:
    runs = [run_of(save_run, tmp_path / "runs" / name, data, "large") for name in ("all", "official")]
    config = runs[1] / "config.yaml"
    assert "predict_next_block: true" in config.read_text()
    config.write_text(config.read_text().replace("predict_next_block: true", "predict_next_block: false"))
    _, notes = reported(*runs)
    assert any("train.predict_next_block: all true, official false" in note for note in notes)
    tokens = summarize(runs[0]).terms.tokens["valid"]
    assert tokens and text_bytes(runs[0], "valid", tokens) and text_bytes(runs[1], "valid", tokens) is None


def test_runs_of_two_tokenizers_are_compared_by_bits_per_byte(
    tmp_path: Path, save_run: SaveRun, data: Path
) -> None:
    runs = [run_of(save_run, tmp_path / "runs" / name, data, name, 3.0) for name in ("large", "small")]
    table, (note,) = reported(*runs)
    for row in ("last training loss", "validation loss", "validation perplexity"):
        assert table[row][2] == NOT_COMPARABLE, row
    expected = []
    for run, name in zip(runs, ("large", "small"), strict=True):
        tokens = summarize(run).terms.tokens["valid"]
        assert tokens is not None
        counted = bytes_by_hand(data, name)
        assert text_bytes(run, "valid", tokens) == counted
        expected.append(3.0 / math.log(2) * tokens / counted)
    assert table["validation bits per byte"] == [
        *(f"{v:.4f}" for v in expected),
        f"{expected[1] / expected[0]:.3f}",
    ]
    assert "Different tokenizers (large " in note and note.endswith("Bits per byte are.")


def test_where_the_text_is_gone_the_way_out_is_named(tmp_path: Path, save_run: SaveRun, data: Path) -> None:
    """Also where the data is not what was evaluated."""
    runs = [run_of(save_run, tmp_path / "runs" / name, data, name) for name in ("large", "small")]
    metrics = runs[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"tokens_evaluated": ', '"tokens_evaluated": 9'))
    table, (note,) = reported(*runs)
    assert "validation bits per byte" not in table and table["validation loss"][2] == NOT_COMPARABLE
    assert note.endswith(WAY_OUT)


@pytest.mark.parametrize(
    ("other", "more", "note", "cell"),
    [
        ("large", {}, None, "1.000"),
        ("other", {}, "The validation data is not the same", NOT_COMPARABLE),
        ("large", {"split": "60,30,10"}, "The validation data is not the same", NOT_COMPARABLE),
        ("large", {"tokens": 32}, "The validation losses are of different amounts of tokens: a ", "1.000"),
    ],
)
def test_what_else_makes_losses_differ_is_said(
    tmp_path: Path, save_run: SaveRun, data: Path, other: str, more: dict[str, Any], note: str | None, cell: str  # noqa: E501
) -> None:  # fmt: skip
    one = run_of(save_run, tmp_path / "runs" / "a", data, "large")
    two = run_of(save_run, tmp_path / "runs" / "b", data, other, **more)
    table, notes = reported(one, two)
    assert table["validation loss"][2] == table["validation perplexity"][2] == cell
    assert table["last training loss"][2] == "1.000"
    assert len(notes) == (note is not None) and all(note in said for said in notes if note)


def test_copies_of_run_folders_without_their_data_are_of_the_same(
    tmp_path: Path, save_run: SaveRun, data: Path
) -> None:
    """What a checkpoint says of the data is enough."""
    copied = shutil.copytree(data, tmp_path / "data")
    runs = [run_of(save_run, tmp_path / "runs" / name, copied, "large") for name in ("a", "b")]
    shutil.rmtree(copied)
    table, notes = reported(*runs)
    assert notes == [] and table["validation loss"][2] == "1.000"


def test_a_plot_of_two_tokenizers_says_so(
    tmp_path: Path, save_run: SaveRun, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_of(save_run, tmp_path / "runs" / name, data, name) for name in ("large", "small", "other")]
    arguments = ["--output", str(tmp_path / "x.png")]
    assert plot_curves.main(["--run", str(runs[0]), "--run", str(runs[1]), *arguments]) == 0
    assert "warning: Different tokenizers (large " in capsys.readouterr().err
    assert plot_curves.main(["--run", str(runs[0]), "--run", str(runs[2]), *arguments]) == 0
    (runs[1] / "config.yaml").unlink()
    assert plot_curves.main(["--run", str(runs[0]), "--run", str(runs[1]), *arguments]) == 0
    assert capsys.readouterr().err == ""
