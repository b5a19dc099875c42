"""``tools/run_status.py``: what a run folder says of whether the run is complete."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import flip_bit, manifest_of, random_checkpoint
from support.manifests import put

from megatron_lpa import files
from megatron_lpa.commands import run_status
from megatron_lpa.config import RunConfig, load_config, save_config
from megatron_lpa.config.model import ModelConfig

MODEL = ModelConfig(
    vocab_size=11, sequence_length=4, hidden_size=8, num_layers=1, num_heads=2, ffn_hidden_size=8
)


def run_folder(folder: Path, *overrides: str, steps: tuple[int, ...] = ()) -> RunConfig:
    """Checkpoints of an order of 1000 samples."""
    config = replace(
        load_config(["--data.prefix", "d", "--train.global_batch_size", "8", *overrides]), model=MODEL
    )
    save_config(config, folder / "config.yaml")
    for step in steps:
        random_checkpoint(folder / "checkpoints", MODEL, step=step, tp_size=1, files=1)
    return config


@pytest.mark.parametrize(
    ("length", "last"),
    [
        ("--train.steps=250", 250),
        ("--train.tokens=8000", 250),  # steps of 8 sequences of 4 tokens
        ("--train.tokens=7969", 250),
        ("--train.epochs=2", 250),  # of 1000 samples
        ("--train.epochs=1.999", 250),
    ],
)
def test_a_run_is_complete_with_the_checkpoint_of_its_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], length: str, last: int
) -> None:
    run_folder(tmp_path, length, steps=(100, last - 1))
    assert run_status.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith(f"incomplete: {last - 1} of {last} steps")
    run_folder(tmp_path, length, steps=(last,))
    assert run_status.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"complete: {last} of {last} steps")


def test_a_damaged_or_unfinished_checkpoint_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path, "--train.steps=9")
    assert run_status.main([str(tmp_path)]) == 1
    assert "no whole checkpoint yet" in capsys.readouterr().out
    run_folder(tmp_path, "--train.steps=9", steps=(5, 9))
    weights = tmp_path / "checkpoints" / "step_00000009" / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run_status.main([str(tmp_path)]) == 1
    assert "5 of 9 steps" in (said := capsys.readouterr().out) and "(step_00000009: damaged)" in said
    (tmp_path / "checkpoints" / "step_00000009" / "manifest.json").unlink()
    assert run_status.main([str(tmp_path)]) == 1
    assert ": damaged)" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["valid", "test"])
def test_an_evaluation_that_was_asked_for_belongs_to_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    asked = ("--data.prefix=null", "--data.train_prefix=a", f"--data.{kind}_prefix=b", "--train.steps=9")
    run_folder(tmp_path, *asked, steps=(9,))
    for step in (None, 5, 9):
        if step is not None:
            record = {"kind": kind, "step": step, "tokens": 1, "loss": 1.0}
            (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        assert run_status.main([str(tmp_path)]) == (0 if step == 9 else 1)
        assert ("is not on record" in capsys.readouterr().out) == (step != 9)
    if kind == "valid":
        run_folder(tmp_path, *asked, "--train.eval_interval=0", steps=(9,))
        (tmp_path / "metrics.jsonl").unlink()
        assert run_status.main([str(tmp_path)]) == 0


def test_a_checkpoint_says_which_evaluations_its_run_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A share of ``data.split`` may be too small for a split; that takes the data to know."""
    run_folder(tmp_path, "--train.steps=9", steps=(9,))
    checkpoint = tmp_path / "checkpoints" / "step_00000009"
    lines = [json.dumps({"kind": kind, "step": 9, "tokens": 1, "loss": 1.0}) for kind in ("valid", "test")]
    for has in (
        {"valid": True, "test": True},
        {"valid": True, "test": False},
        {"valid": False, "test": False},
    ):
        put(checkpoint, {**manifest_of(checkpoint), "evaluates": has})
        for recorded in range(3):
            (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:recorded]) + "\n")
            assert run_status.main([str(tmp_path)]) == (0 if recorded >= sum(has.values()) else 1)
    capsys.readouterr()


def test_what_was_compared_is_said_and_contents_are_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path, "--train.steps=9", steps=(5, 9))
    assert run_status.main([str(tmp_path), "--verify"]) == 0
    assert "step_00000009 (contents compared)" in capsys.readouterr().out
    flip_bit(tmp_path / "checkpoints" / "step_00000009" / "state" / "rank_00000.safetensors")
    assert run_status.main([str(tmp_path)]) == 0
    assert "step_00000009 (sizes compared)" in capsys.readouterr().out
    assert run_status.main(["--verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "5 of 9 steps" in said and "(contents compared) (step_00000009: damaged)" in said


def test_decisions_that_cannot_be_are_damage_here_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path, "--train.steps=9", steps=(9,))
    checkpoint = tmp_path / "checkpoints" / "step_00000009"
    put(checkpoint, {**manifest_of(checkpoint), "decisions": {"rollbacks": -1}})
    assert run_status.main([str(tmp_path)]) == 78
    assert "no whole checkpoint is left (step_00000009)" in capsys.readouterr().err


@pytest.mark.parametrize("sort", ["cut", "without a manifest", "set aside"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sort: str
) -> None:
    run_folder(tmp_path, "--train.steps=9", steps=(5,))
    checkpoint = tmp_path / "checkpoints" / "step_00000005"
    name = checkpoint.name
    if sort == "cut":
        (checkpoint / "weights" / "model.safetensors").write_bytes(b"")
    elif sort == "without a manifest":
        (checkpoint / "manifest.json").unlink()
    else:
        name = f"damaged_{name}"
        checkpoint.rename(tmp_path / "checkpoints" / name)
    assert run_status.main([str(tmp_path)]) == 78
    said = capsys.readouterr()
    assert f"no whole checkpoint is left ({name})" in said.err and said.out == ""


def test_a_checkpoint_that_a_start_brings_back_is_no_loss(tmp_path: Path) -> None:
    run_folder(tmp_path, "--train.steps=9", steps=(5,))
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step_00000005").rename(checkpoints / ".step_00000005.replaced")
    assert run_status.main([str(tmp_path)]) == 1


@pytest.mark.parametrize("tested", [True, False])
def test_a_damaged_line_of_the_records_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tested: bool
) -> None:
    """A start leaves it out, and goes on."""
    run_folder(
        tmp_path,
        "--data.prefix=null",
        "--data.train_prefix=a",
        "--data.test_prefix=b",
        "--train.steps=9",
        steps=(9,),
    )
    line = '{"kind": "test", "step": 9, "tokens": 1, "loss": 1.0}'
    (tmp_path / "metrics.jsonl").write_text(f"{{}}\n\0\n{line if tested else line[:20]}\n")
    assert run_status.main([str(tmp_path)]) == (0 if tested else 1)
    said = capsys.readouterr()
    assert said.err == "" and "metrics.jsonl: line 1 and" in said.out and "damaged)" in said.out
    assert ("not on record" in said.out) != tested


def test_a_record_of_a_kind_of_ones_own_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = ("--data.prefix=null", "--data.train_prefix=a", "--data.test_prefix=b", "--train.steps=9")
    run_folder(tmp_path, *tested, steps=(9,))
    others = '{"kind": "note"}\n{"kind": "grads", "step": 3, "q": null}\n'
    (tmp_path / "metrics.jsonl").write_text(
        f'{others}{{"kind": "test", "step": 9, "tokens": 1, "loss": NaN}}\n'
    )
    assert run_status.main([str(tmp_path)]) == 0
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/step_00000009/manifest.json"])
@pytest.mark.parametrize("times", [1, 3, 99])
def test_a_disk_that_does_not_answer_asks_for_another_try(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    name: str, times: int,
) -> None:  # fmt: skip
    tested = ("--data.prefix=null", "--data.train_prefix=a", "--data.test_prefix=b", "--train.steps=9")
    run_folder(tmp_path, *tested, steps=(9,))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "test", "step": 9, "tokens": 1, "loss": 1.0}\n')
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    real, failed = os.stat, []

    def stat(path: Any, *more: Any, **named: Any) -> os.stat_result:
        if str(path) == str(tmp_path / name) and len(failed) < times:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *more, **named)

    monkeypatch.setattr(os, "stat", stat)
    code = run_status.main([str(tmp_path)])
    said = capsys.readouterr()
    if times < 99:
        assert (code, said.err) == (0, "") and len(failed) == times
    else:
        assert code == 1 and said.err.count("\n") == 1 and str(tmp_path / name) in said.err
        assert "Input/output error" in said.err


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_pipe_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    tested = ("--data.prefix=null", "--data.train_prefix=a", "--data.test_prefix=b", "--train.steps=9")
    run_folder(tmp_path, *tested, steps=(9,))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert run_status.main([str(tmp_path)]) == 78
    assert f"{tmp_path / name}: a named pipe" in capsys.readouterr().err


def test_what_is_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_status.main([str(tmp_path)]) == 78
    assert "config.yaml: no such file" in capsys.readouterr().err
