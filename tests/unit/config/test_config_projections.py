"""Projections that differ by layer, and which of their factors has a bias: what is refused, and what is
built."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lpa.config import (
    ModelConfig,
    ProjectionConfig,
    ProjectionsConfig,
    load_config,
    save_config,
    validate_config,
)
from megatron_lpa.errors import UserError
from megatron_lpa.planning.parameters import count_parameters

Q = "--model.projections.q."


def message(*argv: str) -> str:
    with pytest.raises(UserError) as told:
        validate_config(load_config(["--preset=tiny/lpa", "--data.prefix=x", *argv]), 1)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("value", "fragments"),
    [
        ("{0: dnse}", ["q.by_layer", "dense or a rank"]),
        ("{0: 3.5}", ["q.by_layer", "dense or a rank"]),
        ("{0: true}", ["q.by_layer", "dense or a rank"]),
        ("{0: {rank: 3}}", ["q.by_layer", "dense or a rank"]),
        ("{0.5: 3}", ["q.by_layer", "dense or a rank"]),
        ("{0: 1e30}", ["q.by_layer", "dense or a rank"]),
        ("dense", ["q.by_layer", "dense or a rank", "{0: dense, 1-3: 64}"]),
        ("[dense, 3]", ["q.by_layer", "dense or a rank"]),
        ("{0: 0}", ["q.by_layer, layers 0: rank is 0", "at least 1"]),
        ("{0: -4}", ["q.by_layer, layers 0: rank is -4", "at least 1"]),
        ("{0: 3000000000}", ["q.by_layer, layers 0: rank", "at most"]),
        ("{first: dense}", ["q.by_layer", "first", "as {0: dense, 1-3: 64}"]),
        ("{-1: dense}", ["q.by_layer", "-1", "as {0: dense, 1-3: 64}"]),
        ("{3-1: dense}", ["q.by_layer", "3-1", "as {0: dense, 1-3: 64}"]),
        ("{0, 1: dense}", ["q.by_layer"]),
        ("{4: dense}", ["layers 4", "model.num_layers is 4", "from 0 to 3"]),
        ("{0-9999999999: dense}", ["layers 0-9999999999", "model.num_layers is 4"]),
        ("{0-2: 8, 1: dense}", ["layer 1 twice", "0-2"]),
    ],
)
def test_layers_that_cannot_be_meant_are_refused(value: str, fragments: list[str]) -> None:
    text = message(f"{Q}by_layer={value}")
    assert all(fragment in text for fragment in fragments), text


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--model.projections.up.bias=latent"], ["up.bias is latent", "is dense", "use output"]),
        (
            [f"{Q}bias=both", f"{Q}by_layer={{1: dense}}"],
            ["q.bias is both", "layers 1 is dense", "use output"],
        ),
        ([f"{Q}bias=outputs"], ["q.bias", "'outputs'", "default, none, latent, output, both"]),
        ([f"{Q}bais=output"], ["q.bais", "did you mean --model.projections.q.bias"]),
        ([f"{Q}by_layers={{0: 3}}"], ["did you mean --model.projections.q.by_layer"]),
        (
            ["--model.activation=gelu", "--model.projections.gate.bias=output"],
            ["gate.bias", "gelu has no gate"],
        ),
        (
            ["--model.activation=gelu", "--model.projections.gate.by_layer={0: 8}"],
            ["gate.by_layer", "no gate"],
        ),
        (["--model.activation=gelu_new"], ["gelu_new", "gelu_tanh"]),
        (["--optim.decay_bias=true"], ["did you mean --optim.decay_biases"]),
    ],
)
def test_biases_and_options_that_cannot_be_meant_are_refused(argv: list[str], fragments: list[str]) -> None:
    text = message(*argv)
    assert all(fragment in text for fragment in fragments), text


def test_a_rank_of_one_layer_has_to_fit_tensor_parallelism_too() -> None:
    text = message(f"{Q}by_layer={{2: 33}}", "--parallel.tensor_parallel_size=2")
    assert "model.projections.q.by_layer, layers 2: rank 33" in text and "multiple of 2" in text


def test_a_rank_of_one_layer_that_saves_nothing_is_a_warning() -> None:
    config = load_config(["--preset=tiny/lpa", "--data.prefix=x", f"{Q}by_layer={{1-2: 64}}"])
    (warning,) = validate_config(config, 1)
    assert "q.by_layer, layers 1-2: rank is 64" in warning and "from 63 down" in warning


def test_layers_have_what_their_own_entry_says() -> None:
    config = load_config(["--preset=tiny/lpa", f"{Q}by_layer={{0: dense, 2-3: 8}}", f"{Q}bias=output"])
    own = [config.model.at_layer(layer).projections for layer in range(4)]
    assert [p.q for p in own] == [
        ProjectionConfig("dense", None, "output"), ProjectionConfig("lowdim", 32, "output"),
        ProjectionConfig("lowdim", 8, "output"), ProjectionConfig("lowdim", 8, "output"),
    ]  # fmt: skip
    assert all(p.k == ProjectionConfig("lowdim", 32) for p in own)


def test_layers_of_a_hand_built_configuration_are_checked_too() -> None:
    config = load_config(["--preset=tiny/lpa", "--data.prefix=x"])
    projections = replace(config.model.projections, q=ProjectionConfig(by_layer={"last": 8}))
    config = replace(config, model=replace(config.model, projections=projections))
    with pytest.raises(UserError, match=r"q\.by_layer names layers 'last'; name one by its number"):
        validate_config(config, 1)


def test_a_rank_makes_a_layer_of_a_dense_projection_low_dimensional() -> None:
    assert ProjectionConfig(by_layer={"1": 8}).at_layer(1) == ProjectionConfig("lowdim", 8)


def test_equal_layers_are_counted_together_however_many_there_are() -> None:
    projections = ProjectionsConfig(
        q=ProjectionConfig(by_layer={"0": 8, "5-9": 4}), up=ProjectionConfig(by_layer={"7-2000000000": 16})
    )
    model = ModelConfig(num_layers=2_000_000_001, projections=projections)
    kinds = [(m.projections.q.rank, m.projections.up.rank, count) for m, count in model.layer_kinds()]
    assert kinds == [
        (8, None, 1), (None, None, 4), (4, None, 2), (4, 16, 3), (None, 16, 2_000_000_001 - 10),
    ]  # fmt: skip
    assert ModelConfig().layer_kinds() == [(ModelConfig(), 12)]


def test_it_comes_back_from_a_file_and_may_be_written_in_one(tmp_path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model:\n  projections:\n    q: {by_layer: {0: dense, 1-3: '64'}, bias: both}\n")
    config = load_config(["--preset", "s1_small/lpa", "--config", str(mine)])
    assert config.model.projections.q == ProjectionConfig("lowdim", 256, "both", {"0": "dense", "1-3": 64})
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(["--config", str(tmp_path / "saved.yaml")]) == config
    emptied = load_config(["--config", str(tmp_path / "saved.yaml"), f"{Q}by_layer", "null"])
    assert emptied.model.projections.q.by_layer is None


@pytest.mark.parametrize(
    ("bias", "linear_bias", "dense", "pair_in", "pair_out"),
    [
        ("default", True, (False, True), (True, False), (False, True)),
        ("default", False, (False, False), (False, False), (False, False)),
        ("none", True, (False, False), (False, False), (False, False)),
        ("output", False, (False, True), (False, True), (False, True)),
        ("latent", False, None, (True, False), (True, False)),
        ("both", False, None, (True, True), (True, True)),
    ],
)
def test_which_factor_has_a_bias(bias, linear_bias, dense, pair_in, pair_out) -> None:
    pair, plain = ProjectionConfig("lowdim", 8, bias), ProjectionConfig(bias=bias)
    model = ModelConfig(linear_bias=linear_bias, projections=ProjectionsConfig(q=pair, up=plain, o=pair))
    assert (model.structure("q").biases, model.structure("o").biases) == (pair_in, pair_out)
    assert dense is None or model.structure("up").biases == dense


def test_the_companion_s_model_on_the_page_is_what_its_code_counts(tmp_path) -> None:
    """GPT-2 shape, RoPE, tied, 12 layers of width 768: the first FFN dense, the others of rank 192 with
    output biases."""
    page = Path(__file__).parents[3] / "docs" / "models.md"
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "companion.yaml").write_text(block)
    config = load_config(["--config", str(tmp_path / "companion.yaml"), "--data.prefix", "x"])
    assert validate_config(config, 8) == []
    d, f, r = 768, 3072, 192
    norms, attention, ffn_biases = 2 * 2 * d, 4 * d * d + 4 * d, f + d
    layers = 12 * (norms + attention + ffn_biases) + 2 * d * f + 11 * 2 * r * (d + f)
    assert count_parameters(config.model).total == 32_000 * d + layers + 2 * d
    steps = -(-config.train.tokens // (512 * 1024))
    assert config.optim.warmup_steps == pytest.approx(steps / 10, abs=1)


def test_no_layer_at_all_is_none() -> None:
    none = load_config(["--preset", "tiny/lpa", "--model.projections.q.by_layer", "{}"])
    assert none == load_config(["--preset", "tiny/lpa"])
