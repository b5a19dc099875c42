"""The loop of the paper's public code, with a stand-in for that code, which is no part of the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import official_code
from benchmarks.official_code import official_model
from benchmarks.step_config import Contender, run_config
from benchmarks.step_loops import build_loop
from megatron_lpa.errors import UserError

STAND_IN = """
from torch import nn
from benchmarks.step_config import run_config
from megatron_lpa.model.init import initialize
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups

class LPAForCausalLM(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.sizes = sizes
        model = run_config("tiny/lpa", {"model.num_layers": sizes["num_layers"]}).model
        self.body = Decoder(model, ParallelGroups.single())
        initialize(self.body, model, ParallelGroups.single(), 0)

    def forward(self, input_ids, labels):
        return [self.body(input_ids[:, :-1], labels[:, 1:]).mean()]
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "architecture"
    folder.mkdir()
    for setting in (1, 2):
        (folder / f"lpa_setting{setting}.py").write_text(STAND_IN)
    monkeypatch.setattr(official_code, "FOLDER", tmp_path)


def test_the_loop_learns(stand_in: None) -> None:
    contender = Contender("tiny/lpa", "official", 2, precision="fp32", layers=1, sequence=16)
    loop = build_loop(contender, torch.device("cpu"))
    losses = [float(loop.step()) for _ in range(9)]
    assert losses[8] < losses[0]  # the same batch twice, 8 steps apart


def test_sizes_are_given_in_its_words(stand_in: None) -> None:
    sizes = official_model(run_config("tiny/lpa", {}).model).sizes
    assert sizes == {
        "vocab_size": 4096, "embed_dim": 128, "ffn_dim": 384, "num_heads": 4, "head_dim": 32,
        "attn_lowdim": 32,
        "ffn_lowdim": 1, "num_layers": 4, "seq_len": 256, "low_attn": "yes", "low_ffn": "no",
    }  # fmt: skip


def test_a_model_that_it_does_not_have_is_refused(stand_in: None) -> None:
    with pytest.raises(UserError, match="no such model"):
        official_model(run_config("tiny/lpa", {"model.ffn_hidden_size": 512}).model)


def test_without_a_copy_the_way_to_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official_code, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="git clone"):
        official_model(run_config("tiny/lpa", {}).model)
