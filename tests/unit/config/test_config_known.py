"""Keys and files that were meant otherwise: the message has what was meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lpa.config import load_config, save_config
from megatron_lpa.config.schema import CONFIG_KEYS
from megatron_lpa.errors import UserError

ROOT = Path(__file__).parents[3]
RANKS = [name for name in CONFIG_KEYS if name.endswith(".rank")]


def message(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def meant(text: str) -> list[str]:
    return text.partition("did you mean ")[2].rstrip("?").split(", ")


@pytest.mark.parametrize(
    ("yaml", "wrong", "best"),
    [
        ("modle: {hidden_size: 3}", "modle", "model"),
        ("modle:\n  projections: {q: {rank: 3}}", "modle", "model"),
        ("optimizer: {lr: 1}", "optimizer", "optim"),
        ("Train: {steps: 1}", "Train", "train"),
        ("projections: {q: {rank: 3}}", "projections", "model.projections"),
        ("model: {projectoins: {q: {rank: 3}}}", "model.projectoins", "model.projections"),
        ("model: {projections: {Q: {rank: 3}}}", "model.projections.Q", "model.projections.q"),
        ("model: {projections: {q: {rnak: 3}}}", "model.projections.q.rnak", "model.projections.q.rank"),
        ("hidden_size: 3", "hidden_size", "model.hidden_size"),
        ("train: {lr: 3}", "train.lr", "optim.lr"),
        ("modle: 3", "modle", "model"),
        ("trian.steps: 3", "trian.steps", "train.steps"),
    ],
)
def test_a_file_with_a_mistyped_name_is_told_the_right_one(
    tmp_path: Path, yaml: str, wrong: str, best: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml)
    text = message("--config", str(path))
    assert f"unknown key {wrong} in {path}; did you mean " in text
    assert meant(text)[0] == best


@pytest.mark.parametrize("name", ["rank", "rnak", "model.rank", "model.projections.rank", "projections.rank"])
def test_a_rank_of_no_projection_may_be_that_of_any(name: str) -> None:
    assert sorted(meant(message(f"--{name}", "16"))) == sorted(f"--{key}" for key in RANKS)


@pytest.mark.parametrize("name", ["o.rank", "projections.o.rank"])
def test_the_end_of_a_key_finds_that_key_alone(name: str) -> None:
    assert meant(message(f"--{name}", "16")) == ["--model.projections.o.rank"]


def test_a_file_of_deepspeed_is_called_one(tmp_path: Path) -> None:
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        text = message("--config", str(path))
        assert "a file of DeepSpeed" in text and f"--train.deepspeed_config {path}" in text
    whole = tmp_path / "ds.json"
    whole.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": True}}))
    assert "a file of DeepSpeed (it has 'train_micro_batch_size_per_gpu')" in message("--config", str(whole))


def test_other_files_and_names_that_are_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--preset" in message("--config", str(ROOT / "megatron_lpa" / "presets" / "tiny.yaml"))
    hugging_face = tmp_path / "config.json"
    hugging_face.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 64}))
    assert "Hugging Face (it has 'architectures')" in message("--config", str(hugging_face))
    assert message("--config", "tiny/lpa").endswith("give --preset tiny/lpa")
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    assert f"--config {run}: a folder, not a regular file" in message("--config", str(run))
    save_config(load_config([]), run / "config.yaml")
    assert message("--config", str(run)).endswith(f"give {run}/config.yaml")
    # A file that is there is read, whatever it is called.
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "lpa").write_text("train: {seed: 3}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(["--config", "tiny/lpa"]).train.seed == 3
