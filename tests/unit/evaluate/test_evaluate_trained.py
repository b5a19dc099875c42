"""Opening run folders and checkpoint folders."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lpa import files
from megatron_lpa.config import KernelConfig, load_config, save_config
from megatron_lpa.config.kernels import most_whole_logits_bytes
from megatron_lpa.data.tokenizers.opening import save_tokenizer
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.evaluate.trained import find_checkpoint, load_run, required_tokenizer
from megatron_lpa.model.transformer import Decoder

SaveRun = Callable[..., Path]


def test_a_run_is_opened_at_its_newest_complete_checkpoint(
    tmp_path: Path, save_run: SaveRun, decoder: Decoder
) -> None:
    folder = save_run(tmp_path / "runs" / "a", (10, 20))
    (folder / "checkpoints" / "step_00000030").mkdir()  # no manifest: not complete
    run = load_run(folder)
    assert (run.step, run.folder, run.manifest["layout"]["data_parallel_size"]) == (20, folder, 3)
    assert not run.decoder.training
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(run.decoder.cpu()(ids), decoder(ids))


def test_a_step_or_a_checkpoint_folder_can_be_chosen(tmp_path: Path, save_run: SaveRun) -> None:
    folder = save_run(tmp_path / "runs" / "a", (10, 20))
    checkpoint = folder / "checkpoints" / "step_00000010"
    by_step, by_folder = load_run(folder, step=10), load_run(checkpoint)
    assert by_step.step == by_folder.step == 10
    assert by_folder.folder == folder
    name, value = next(by_step.decoder.named_parameters())
    torch.testing.assert_close(value, dict(load_run(folder).decoder.named_parameters())[name] - 10)


def test_the_tokenizer_is_found_from_anywhere(
    tmp_path: Path, save_run: SaveRun, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "tok").symlink_to(tokenizer_folder)
    folder = save_run(tmp_path / "project" / "runs" / "a", tokenizer="tok")  # relative, as in training
    monkeypatch.chdir(tmp_path)
    assert required_tokenizer(load_run(folder)).vocab_size == 300
    monkeypatch.chdir(folder)
    assert required_tokenizer(load_run(".")).vocab_size == 300


@pytest.mark.parametrize("place", ["/", "/ckpt"])
def test_a_checkpoint_directly_below_the_root_has_no_run_folder(
    tmp_path: Path, save_run: SaveRun, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    checkpoint = save_run(tmp_path / "runs" / "a", (10,)) / "checkpoints" / "step_00000010"
    monkeypatch.setattr(Path, "resolve", lambda path: Path(place))
    with pytest.raises(UserError, match=r"step_00000010: a checkpoint outside of a run folder"):
        find_checkpoint(checkpoint)


def test_what_is_wrong_is_said(tmp_path: Path, save_run: SaveRun) -> None:
    folder = save_run(tmp_path / "runs" / "a", (10, 20))
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no complete checkpoint of step 7; it has 10, 20"):
        load_run(folder, step=7)
    with pytest.raises(UserError, match=r"empty/checkpoints holds no complete checkpoint"):
        (tmp_path / "empty").mkdir()
        load_run(tmp_path / "empty")
    gone = save_run(tmp_path / "runs" / "b", tokenizer="gone/tokenizer.json")
    with pytest.raises(UserError, match=r"config\.yaml: data\.tokenizer .*gone/tokenizer\.json.*--tokenizer"):
        load_run(gone)
    none = save_run(tmp_path / "runs" / "c", tokenizer=None)
    with pytest.raises(UserError, match=r"data\.tokenizer is empty.*--tokenizer"):
        required_tokenizer(load_run(none))
    weights = folder / "checkpoints" / "step_00000020" / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: missing or not \d+ bytes long"):
        load_run(folder)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_a_disk_that_does_not_answer_is_asked_again_and_is_no_bad_run(
    tmp_path: Path, save_run: SaveRun, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """At each place where something is looked for, by whatever call: as soon as it answers, all is well."""
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    shutil.copytree(tokenizer_folder, tmp_path / "project/tok")
    folder = save_run(tmp_path / "project/runs/a", tokenizer="tok")
    real = os.stat
    left: dict[str, int] = {}
    seen: set[str] = set()

    def looks(path: Any, *more: Any, **named: Any) -> os.stat_result:
        seen.add(str(path))
        if left.get(str(path), 0) > 0:
            left[str(path)] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *more, **named)

    monkeypatch.setattr(os, "stat", looks)
    load_run(folder)
    places = sorted(path for path in seen if path.startswith(str(tmp_path)))
    assert {str(folder), str(folder / "config.yaml"), str(folder / "tokenizer")} <= set(places)
    for path in places:
        left[path] = 2
        load_run(folder)
        assert left[path] == 0
        left[path] = 10**6
        with pytest.raises(TryAgain) as told:
            load_run(folder)
        left[path] = 0
        assert told.value.exit_code == 1 and path in str(told.value) and "\n" not in str(told.value)


def test_opening_a_run_needs_no_deepspeed() -> None:
    code = "import sys, megatron_lpa.evaluate.trained; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_damaged_weights_are_never_used(tmp_path: Path, save_run: SaveRun) -> None:
    folder = save_run(tmp_path / "runs" / "a", (10,))
    weights = folder / "checkpoints" / "step_00000010" / "weights" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-8:] = bytes(8)
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: the contents differ"):
        load_run(folder)


def test_a_run_keeps_its_own_copy_of_the_tokenizer(tmp_path: Path, save_run: SaveRun) -> None:
    folder = save_run(tmp_path / "runs" / "a", tokenizer="gone/tokenizer.json")
    source = save_run(tmp_path / "runs" / "b")
    recorded = load_run(source)
    assert recorded.tokenizer is not None and recorded.config.data.tokenizer is not None
    save_tokenizer(str(tmp_path / recorded.config.data.tokenizer), folder / "tokenizer")
    found = load_run(folder).tokenizer
    assert found is not None and found.fingerprint == recorded.tokenizer.fingerprint


def test_a_run_is_evaluated_by_its_own_kernels_or_what_can_run_here(
    tmp_path: Path, save_run: SaveRun
) -> None:
    folder = save_run(tmp_path / "runs" / "kernels")
    config = load_config(["--config", str(folder / "config.yaml")])
    for kernels, expected in (
        (
            KernelConfig("joined", "eager", "chunked", "sdpa"),
            KernelConfig("joined", "eager", "chunked", "auto"),
        ),
        (
            KernelConfig("fused", "liger", "whole", "flash_attn"),
            KernelConfig("auto", "auto", "whole", "auto"),
        ),
    ):
        save_config(replace(config, kernels=kernels), folder / "config.yaml")
        decoder = load_run(folder).decoder
        assert decoder.layers[0].attention.kernels == expected
        head = (decoder.head.backend, decoder.head.most_bytes)
        assert head == (expected.elementwise, most_whole_logits_bytes(expected.loss))
