"""The documents that a run held out, and no others; and data that its model cannot be judged by."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.token_datasets import TOKENIZER, write_dataset

from megatron_lpa.commands import evaluate
from megatron_lpa.config import DataConfig
from megatron_lpa.data.splits import Splits, open_splits
from megatron_lpa.data.storage.dataset_manifest import Manifest
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.tokenizers.opening import Tokenizer
from megatron_lpa.evaluate.perplexity import TextLoss, sum_of
from megatron_lpa.model.transformer import Decoder

SaveRun = Callable[..., Path]
S, SEED = 16, 1234
SPLIT = "60,25,15"


def write(prefix: Path, seed: int, fingerprint: str, dtype: type = np.uint16) -> str:
    """Documents of ids below 300."""
    random = np.random.default_rng(seed)
    documents = [[*random.integers(1, 300, random.integers(20, 60)).tolist(), 0] for _ in range(60)]
    record = replace(TOKENIZER, fingerprint=fingerprint, vocab_size=300)

    def made_by(manifest: Manifest) -> Manifest:
        return replace(manifest, tokenizer=record)

    return str(write_dataset(prefix, documents, dtype, change=made_by))


@pytest.fixture
def prefixes(tmp_path: Path, tokenizer: Tokenizer) -> list[str]:
    return [write(tmp_path / name, seed, tokenizer.fingerprint) for seed, name in enumerate("abc")]


def run_tool(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = evaluate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def in_training(decoder: Decoder, splits: Splits, name: str) -> tuple[float, int]:
    """The loss as the training loop has it: every sample of the plain order, once."""
    split = getattr(splits, name)
    rows = torch.from_numpy(split.read(split.in_order(np.arange(split.num_samples))))
    with torch.inference_mode():
        return float(decoder(rows[:, :-1], rows[:, 1:]).double().mean()), rows[:, 1:].numel()


@pytest.mark.parametrize("kind", ["prefix", "blend", "train_prefix", "file order"])
@pytest.mark.parametrize("name", ["valid", "test"])
def test_a_split_gives_the_loss_of_the_training_loop(
    tmp_path: Path,
    prefixes: list[str],
    save_run: SaveRun,
    decoder: Decoder,
    kind: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {
        "prefix": DataConfig(prefix=prefixes[0], split=SPLIT),
        "file order": DataConfig(prefix=prefixes[0], split=SPLIT, shuffle_documents=False),
        "blend": DataConfig(blend=dict(zip(prefixes, (0.5, 0.2, 0.3), strict=True)), split=SPLIT),
        "train_prefix": DataConfig(
            train_prefix=prefixes[0], valid_prefix=prefixes[1], test_prefix=prefixes[2]
        ),
    }[kind]
    splits = open_splits(data, S, SEED)
    run = save_run(tmp_path / "runs" / "a", data=data, facts=splits.train.facts())
    expected, tokens = in_training(decoder, splits, name)
    code, out, err = run_tool(capsys, "--run", run, "--split", name, "--json")
    found = json.loads(out)
    assert code == 0 and "warning" not in err and found["split"] == name
    assert found["tokens"] == tokens and found["loss"] == pytest.approx(expected, rel=1e-5)
    code, out, _ = run_tool(
        capsys, "--run", run, "--split", name, "--stride", 4, "--max-tokens", 5 * S, "--json"
    )
    slid = json.loads(out)
    assert code == 0 and slid["tokens"] == 5 * S and slid["text_bytes"] > 0
    assert f"the {name} split, {tokens:,} tokens" in run_tool(capsys, "--run", run, "--split", name)[1]


def test_a_run_that_was_started_elsewhere(
    tmp_path: Path, prefixes: list[str], save_run: SaveRun, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Relative paths are those of the folder that training was started in."""
    run = save_run(tmp_path / "runs" / "a", data=DataConfig(blend={"a": 1, "b": 1}, split=SPLIT))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_tool(capsys, "--run", run, "--split", "valid")[0] == 0
    assert not list((tmp_path / "elsewhere").iterdir())
    assert "is the run's data.blend" in run_tool(capsys, "--run", run, "--data", prefixes[0])[2]


def test_splits_that_there_are_not(
    tmp_path: Path, prefixes: list[str], save_run: SaveRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "runs" / "a", data=DataConfig(train_prefix=prefixes[0]))
    code, _, err = run_tool(capsys, "--run", run, "--split", "test")
    assert code == 78 and "has no test split" in err and "--data" in err
    data = DataConfig(prefix=prefixes[0], split="100,0,0")
    run = save_run(tmp_path / "runs" / "b", data=data)
    code, _, err = run_tool(capsys, "--run", run, "--split", "valid")
    assert code == 78 and "has no valid split: no validation split: its share of" in err


def test_a_split_of_other_data_than_was_trained_on_is_refused(
    tmp_path: Path, prefixes: list[str], save_run: SaveRun, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataConfig(prefix=prefixes[0], split=SPLIT)
    facts = open_splits(data, S, SEED).train.facts()
    run = save_run(tmp_path / "runs" / "a", data=data, facts=facts)
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefixes[1]}{suffix}", f"{prefixes[0]}{suffix}")
    code, _, err = run_tool(capsys, "--run", run, "--split", "valid")
    assert (
        code == 78
        and f"data.contents was {facts['contents']}, is " in err
        and "held-out documents cannot" in err
    )


def test_data_of_another_tokenizer_is_refused(
    tmp_path: Path, prefixes: list[str], save_run: SaveRun, tokenizer_folder: Path, tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = write(tmp_path / "other", 9, "1" * 64)
    bare = write(tmp_path / "bare", 10, "1" * 64)
    Path(f"{bare}.json").unlink()
    trained_on = DataConfig(train_prefix=prefixes[0])
    with_copy = save_run(tmp_path / "runs" / "copy", tokenizer=None)
    shutil.copytree(tokenizer_folder, with_copy / "tokenizer")
    runs: list[tuple[Path, list[Any]]] = [
        (save_run(tmp_path / "runs" / "recorded"), []),
        (with_copy, []),
        (with_copy, ["--tokenizer", tokenizer_folder]),
        (save_run(tmp_path / "runs" / "by-data", tokenizer=None, data=trained_on), []),
    ]
    for run, options in runs:
        code, out, err = run_tool(capsys, "--run", run, "--data", other, *options)
        assert (code, out) == (78, "") and "other.json: made with the tokenizer tok (1111111111111111)" in err
        assert tokenizer.fingerprint[:16] in err
        assert run_tool(capsys, "--run", run, "--data", prefixes[1], *options)[::2] == (0, "")
        code, _, err = run_tool(capsys, "--run", run, "--data", bare, *options)
        assert code == 0 and f"warning: {bare} has no manifest" in err
    unknown = save_run(tmp_path / "runs" / "unknown", tokenizer=None)
    code, _, err = run_tool(capsys, "--run", unknown, "--data", other)
    assert code == 0 and "records no tokenizer" in err


def test_training_data_is_warned_of(
    tmp_path: Path, prefixes: list[str], save_run: SaveRun, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefixes[0]}{suffix}", tmp_path / f"copy{suffix}")
    for number, data in enumerate(
        (
            DataConfig(prefix=prefixes[0]),
            DataConfig(train_prefix=prefixes[0], valid_prefix=prefixes[2]),
            DataConfig(blend={prefixes[1]: 1, prefixes[0]: 1}),
        )
    ):
        run = save_run(tmp_path / "runs" / str(number), data=data)
        for spelling in (prefixes[0], f"{tmp_path}/runs/../a", str(tmp_path / "copy")):
            code, out, err = run_tool(capsys, "--run", run, "--data", spelling, "--json")
            assert code == 0 and json.loads(out)["loss"] > 0
            assert f"warning: {spelling} is the run's data." in err
            assert ("--split valid" in err) == (data.train_prefix is None)
        assert "warning" not in run_tool(capsys, "--run", run, "--data", prefixes[2])[2]


def test_sums() -> None:
    total = sum_of([TextLoss(1.0, 2, 3, 4), TextLoss(10.0, 20, 30, 40)])
    assert total == TextLoss(11.0, 22, 33, 44) and total.perplexity == pytest.approx(math.exp(0.5))
    assert sum_of([TextLoss(1.0, 2, 3, 4), TextLoss(10.0, 20)]) == TextLoss(11.0, 22)


def test_all_of_a_dataset_is_still_what_data_reads(
    tmp_path: Path, prefixes: list[str], save_run: SaveRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "runs" / "a")
    found = json.loads(run_tool(capsys, "--run", run, "--data", prefixes[0], "--json")[1])
    assert found["tokens"] == (IndexedDataset(prefixes[0]).num_tokens - 1) // S * S and found["split"] is None
