"""Every preset runs, and has the parameter count that the paper prints (paper.md names the tables)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_lpa.config import fitted_to_world, load_config, preset_names, validate_config
from megatron_lpa.config.compare import differences
from megatron_lpa.planning.memory import estimate_memory
from megatron_lpa.planning.parameters import count_parameters

COUNTS_MILLIONS = {
    "s1_small/transformer": 135,
    "s1_small/same_param": 128,
    "s1_small/lpa": 125,
    "s1_small/low_ffn": 125,
    "s1_small/low_all": 126,
    "s1_small/attn_dim": 135,
    "s1_small/ffn_dim": 135,
    "s1_small/layer_num": 138,
    "s1_medium/transformer": 369,
    "s1_medium/same_param": 319,
    "s1_medium/lpa": 319,
    "s1_medium/lpa_r128": 293,
    "s1_medium/lpa_r64": 281,
    "s1_medium/lpa_r32": 274,
    "s1_medium/lpa_kv": 344,
    "s1_medium/lpa_qkv": 331,
    "s1_medium/low_ffn": 325,
    "s1_medium/low_all": 318,
    "s1_medium/attn_dim": 369,
    "s1_medium/ffn_dim": 369,
    "s1_medium/layer_num": 371,
    "s2_small/transformer": 134,
    "s2_small/same_param": 116,
    "s2_small/lpa": 115,
    "s2_small/low_ffn": 116,
    "s2_small/low_all": 117,
    "s2_medium/transformer": 368,
    "s2_medium/same_param": 318,
    "s2_medium/lpa": 318,
    "s2_medium/lpa_kv": 343,
    "s2_medium/lpa_qkv": 330,
    "s2_medium/low_ffn": 318,
    "s2_medium/low_all": 314,
    "s1_small/official": 125,
    "s1_small/official_transformer": 135,
    "s1_medium/official": 319,
    "s1_medium/official_transformer": 369,
    "s2_small/official": 115,
    "s2_small/official_transformer": 134,
    "s2_medium/official": 318,
    "s2_medium/official_transformer": 368,
}
COUNTS_BILLIONS = {"3b/transformer": 3.23, "3b/same_param": 2.49, "3b/lpa": 2.43}


def parameters(name: str, *overrides: str) -> int:
    return count_parameters(load_config(["--preset", name, *overrides]).model).total


@pytest.mark.parametrize(("name", "millions"), COUNTS_MILLIONS.items())
def test_count_is_the_papers_in_millions(name: str, millions: int) -> None:
    assert round(parameters(name) / 1e6) == millions


@pytest.mark.parametrize(("name", "billions"), COUNTS_BILLIONS.items())
def test_count_is_the_papers_in_billions(name: str, billions: float) -> None:
    assert round(parameters(name) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("name", "millions"), [("3b/transformer", 3246), ("3b/same_param", 2504), ("3b/lpa", 2440)]
)
def test_the_printed_ffn_width_of_the_3b_models_is_an_override(name: str, millions: int) -> None:
    assert round(parameters(name, "--model.ffn_hidden_size=14436") / 1e6) == millions


def test_every_preset_of_the_paper_is_counted() -> None:
    counted = {*COUNTS_MILLIONS, *COUNTS_BILLIONS}
    assert counted == {name for name in preset_names() if not name.startswith("tiny/")}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_validates_where_it_is_meant_to_run(name: str) -> None:
    config = load_config(["--preset", name, "--data.prefix", "corpus"])
    for world_size in (1, 2) if name.startswith("tiny/") else (1, 8):
        assert validate_config(config, world_size) == []


@pytest.mark.parametrize("name", ["3b/transformer", "3b/same_param", "3b/lpa"])
def test_the_3b_models_take_a_step_of_16_gpus_in_one_pass_and_fit_80_gib(name: str) -> None:
    config = load_config(["--preset", name, "--data.prefix", "corpus"])
    assert config.train.global_batch_size == 16 * config.train.micro_batch_size
    for gpus in (8, 16):
        needed = estimate_memory(
            config.model, config.parallel, config.train, config.kernels, data_parallel_size=gpus, zero_stage=3
        )
        gathered = 2 * knobs("zero3")["stage3_max_live_parameters"]
        assert needed.bytes_total + gathered < 0.6 * 80 * 2**30
    for nodes in (4, 8):
        fitted, notes = fitted_to_world(config, 8 * nodes)
        assert validate_config(fitted, 8 * nodes) == [] and len(notes) == 1


def knobs(name: str) -> dict[str, int]:
    shipped = json.loads((Path(__file__).parents[3] / "ds_configs" / f"{name}.json").read_text())
    return shipped["zero_optimization"]


@pytest.mark.parametrize("name", preset_names())
def test_zero3_prefetches_whole_layers_and_the_head(name: str) -> None:
    """DeepSpeed fetches ahead until it has passed the bucket, and only while what is gathered is under the
    limit."""
    model = load_config(["--preset", name]).model
    counts = count_parameters(model)
    layer = (counts.attention + counts.ffn + counts.norm) // model.num_layers
    for file in ("zero3", "zero3_offload"):
        assert knobs(file)["stage3_prefetch_bucket_size"] >= layer
    # The layers around the head, and what is kept because it is used again within the reuse distance.
    zero = knobs("zero3")
    assert zero["stage3_max_live_parameters"] >= zero["stage3_max_reuse_distance"] + 2 * layer + counts.head


@pytest.mark.parametrize(
    ("family", "tokens_per_step"),
    [
        ("s1_small", 81_920),
        ("s1_medium", 98_304),
        ("s2_small", 81_920),
        ("s2_medium", 61_440),
        ("3b", 262_144),
    ],
)
def test_recipes_are_the_papers(family: str, tokens_per_step: int) -> None:
    """Tables 9 and 10: 82K, 98K, 82K, 61K and 262K tokens per batch."""
    config = load_config(["--preset", f"{family}/transformer"])
    assert config.train.global_batch_size * config.model.sequence_length == tokens_per_step
    assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.95, 1e-5)


@pytest.mark.parametrize(
    ("family", "transformer", "lpa"),
    [
        ("s1_small", 8e-4, 8e-4),
        ("s1_medium", 8e-4, 8e-4),
        ("s2_small", 1e-3, 1e-3),
        ("s2_medium", 1e-3, 8e-4),
        ("3b", 3e-4, 6e-4),
    ],
)
def test_learning_rates_are_the_papers(family: str, transformer: float, lpa: float) -> None:
    assert load_config(["--preset", f"{family}/transformer"]).optim.lr == transformer
    assert load_config(["--preset", f"{family}/same_param"]).optim.lr == transformer
    assert load_config(["--preset", f"{family}/lpa"]).optim.lr == lpa


# The public code's two scripts and the defaults of the trainer that they call; the paper's where it says
# something.
@pytest.mark.parametrize("variant", ["official", "official_transformer"])
@pytest.mark.parametrize(
    ("family", "vocabulary", "precision", "warmup", "eval_interval", "lr"),
    [
        ("s1_small", 32_000, "fp32", 1000, 200, {"official": 8e-4, "official_transformer": 8e-4}),
        ("s1_medium", 32_000, "fp32", 1000, 200, {"official": 8e-4, "official_transformer": 8e-4}),
        ("s2_small", 32_001, "bf16_mixed", 0, 300, {"official": 1e-3, "official_transformer": 1e-3}),
        ("s2_medium", 32_001, "bf16_mixed", 0, 300, {"official": 8e-4, "official_transformer": 1e-3}),
    ],
)
def test_official_presets_do_what_the_public_code_does(
    family: str,
    variant: str,
    vocabulary: int,
    precision: str,
    warmup: int,
    eval_interval: int,
    lr: dict[str, float],
) -> None:
    config = load_config(["--preset", f"{family}/{variant}"])
    optim, train, model = config.optim, config.train, config.model
    assert (optim.lr, optim.warmup_steps, optim.schedule, optim.min_lr_ratio) == (
        lr[variant],
        warmup,
        "cosine",
        0,
    )
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.95, 1e-5)
    assert (optim.weight_decay, optim.grad_clip) == (0.0, 1.0)
    assert (train.seed, train.precision, train.predict_next_block) == (27, precision, False)
    assert train.eval_interval == eval_interval and model.vocab_size == vocabulary
    assert (model.init, model.tie_embeddings, model.lm_head_bias) == ("pytorch", False, True)
    first = family.startswith("s1")
    assert (model.norm, model.norm_position, model.final_norm) == (
        ("layernorm", "post_sublayer", False) if first else ("rmsnorm", "pre", True)
    )
    assert (model.activation, model.position_embedding, model.linear_bias, model.dropout, model.norm_eps) == (
        ("relu", "learned", True, 0.1, 1e-5) if first else ("swiglu", "rope", False, 0.0, 1e-6)
    )


@pytest.mark.parametrize("family", ["s1_small", "s1_medium", "s2_small", "s2_medium"])
def test_official_presets_differ_from_the_others_in_what_the_page_says(family: str) -> None:
    for variant, plain in (("official", "lpa"), ("official_transformer", "transformer")):
        names = differences(*(asdict(load_config(["--preset", f"{family}/{v}"])) for v in (plain, variant)))
        changed = {line.partition(" was ")[0] for line in names} - {"logging.name"}
        common = {"train.predict_next_block"}
        assert changed - common == (
            {"train.precision", "train.eval_batches"}
            if family.startswith("s1")
            else {"model.vocab_size", "optim.warmup_steps", "train.eval_interval", "train.precision"}
        )


def test_tiny_variants_are_comparable_and_small() -> None:
    lpa = parameters("tiny/lpa")
    for variant in ("same_param", "low_ffn", "low_all"):
        assert parameters(f"tiny/{variant}") == pytest.approx(lpa, rel=0.01)
    assert lpa < parameters("tiny/transformer") < 3_000_000
