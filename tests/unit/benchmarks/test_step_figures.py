"""The arithmetic of whole-step benchmarks against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.step_config import Contender, llama_equivalent, run_config
from benchmarks.step_figures import (
    comparisons,
    expected_saving,
    measured,
    saving_limit,
    spread,
    table,
    throughput,
)
from megatron_lpa.config import load_config, preset_names
from megatron_lpa.errors import UserError
from megatron_lpa.planning.flops import flops_per_token_forward

DENSE = run_config("3b/transformer", {}).model
LPA = run_config("3b/lpa", {}).model

# Per layer 4 x 4096^2 + 2 x 4096 x 14336 = 184,549,376 matrix elements, twice that in FLOPs, and 2 x 4096 x
# 4096 for causal attention; 16 layers; the head's 2 x 32000 x 4096; backward is two forwards.
DENSE_TRAINING = 3 * (16 * (2 * 184_549_376 + 33_554_432) + 262_144_000)
# q, k, v, o: 4 x 512 x (4096 + 4096) = 16,777,216 in place of 67,108,864.
LPA_TRAINING = 3 * (16 * (2 * 134_217_728 + 33_554_432) + 262_144_000)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_what_the_command_line_loads(name: str) -> None:
    loaded = load_config(["--preset", name])
    assert dataclasses.replace(loaded, logging=run_config(name, {}).logging) == run_config(name, {})


def test_settings_go_over_changes_over_the_preset() -> None:
    config = run_config(
        "3b/lpa",
        {"model.num_layers": 2, "train.precision": "fp32"},
        ["kernels.lowdim=joined", "model.num_layers=3", "model.final_norm=false", "optim.lr=1e-3"],
    )
    assert (config.model.num_layers, config.train.precision, config.optim.lr) == (3, "fp32", 1e-3)
    assert config.kernels.lowdim == "joined" and config.model.final_norm is False


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("kernels.lowdim", "write it as key=value"),
        ("kernels.lowdm=joined", "unknown key 'kernels.lowdm'; did you mean kernels.lowdim"),
        ("kernels.lowdim=best", "kernels.lowdim=best: expected one of auto"),
        ("model.num_layers=2.5", "model.num_layers=2.5: expected a whole number"),
        ("model.final_norm=maybe", "expected true or false"),
    ],
)
def test_wrong_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config("3b/lpa", {}, [setting])


def test_a_contender_changes_batch_depth_and_length() -> None:
    contender = Contender("3b/lpa", "engine", micro_batch=2, accumulate=3, layers=2, sequence=128)
    config = contender.config()
    assert (config.train.micro_batch_size, config.train.global_batch_size) == (2, 6)
    assert (config.model.num_layers, config.model.sequence_length) == (2, 128)
    assert contender.tokens_per_step == 6 * 128


def test_throughput_and_mfu_by_hand() -> None:
    figures = throughput(DENSE, 16384, 600.0, 989e12)
    assert figures["flops_per_token"] == DENSE_TRAINING == 20_113_784_832
    assert figures["tokens_per_second"] == pytest.approx(27306.67, rel=1e-6)
    assert figures["model_flops_per_second"] == pytest.approx(549.24e12, rel=1e-5)
    assert figures["mfu"] == pytest.approx(0.55535, rel=1e-4)
    evaluation = throughput(DENSE, 16384, 600.0, None, training=False)
    assert evaluation["flops_per_token"] == DENSE_TRAINING / 3 and evaluation["mfu"] is None


def test_what_lpa_can_save() -> None:
    assert saving_limit(LPA, DENSE) == pytest.approx(1 - LPA_TRAINING / DENSE_TRAINING)
    assert round(100 * saving_limit(LPA, DENSE), 1) == 24.0
    # 0.58 of 0.80: products take 72.5 % of the step, and 24 % of that is saved.
    assert expected_saving(0.24, 0.58, 0.80) == pytest.approx(0.174)


def test_llama_has_nearly_the_same_flops() -> None:
    llama = llama_equivalent(DENSE)
    assert llama.ffn_hidden_size == 9600  # two thirds of 14336 is 9557.3; 75 x 128 is nearest
    # Three matrices of 9600 against two of 14336: (4 x 4096 + 3 x 9600) / (4 x 4096 + 2 x 14336) of the
    # elements.
    matrices = 16 * 2 * 4096 * (4 * 4096 + 3 * 9600)
    assert flops_per_token_forward(llama) == matrices + 16 * 33_554_432 + 262_144_000
    assert flops_per_token_forward(llama) / flops_per_token_forward(DENSE) == pytest.approx(1, abs=0.004)
    swiglu = run_config("s2_small/transformer", {}).model
    assert llama_equivalent(swiglu) == dataclasses.replace(swiglu, lm_head_bias=False)
    with pytest.raises(UserError, match="dense models only"):
        llama_equivalent(LPA)


def test_times_of_rounds_are_pooled() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "p10": 1.0, "p90": 3.0}
    pooled = measured([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])
    assert pooled["steps"] == 6 and pooled["step_ms"]["median"] == 4.0
    assert pooled["round_medians_ms"] == [2.0, 6.0]


def record(preset: str, loop: str, step_ms: float, **more: float) -> dict:
    model = {"lpa": LPA, "transformer": DENSE}[preset.partition("/")[2]]
    figures = throughput(model, 4096, step_ms, 989e12)
    return {"preset": preset, "loop": loop, **measured([[step_ms]]), **figures, **more}


def test_comparisons_by_hand_leave_failures_out() -> None:
    records = [
        record("3b/transformer", "bare", 100.0, peak_memory_bytes=2**30),
        record("3b/lpa", "bare", 80.0, peak_memory_bytes=2**29),
        record("3b/lpa", "engine", 82.0),
        record("3b/transformer", "llama", 125.0),
        record("3b/transformer", "llama_plain", 160.0),
        record("3b/lpa", "official", 100.0),
        {
            "preset": "3b/transformer",
            "loop": "engine",
            "error": "out of memory: 1 GiB",
            "out_of_memory": True,
        },
    ]
    models = {(r["preset"], r["loop"]): LPA if r["preset"] == "3b/lpa" else DENSE for r in records}
    lines = {line["what"]: line for line in comparisons(records, models)}
    assert len(lines) == 5
    assert lines["3b/transformer: bare loop against llama_plain"]["time_ratio"] == pytest.approx(0.625)
    assert lines["3b/lpa: bare loop against official"]["time_ratio"] == pytest.approx(0.8)
    saved = lines["3b/lpa saves against 3b/transformer, bare"]
    assert saved["time"] == pytest.approx(0.2) and saved["memory_ratio"] == 0.5
    assert saved["limit"] == pytest.approx(0.2402, abs=1e-4)
    assert lines["3b/lpa: engine slower than bare loop"]["time"] == pytest.approx(0.025)
    assert lines["3b/transformer: bare loop's FLOP/s above llama's"]["flops"] == pytest.approx(0.25)
    shown = table(records, list(lines.values()))
    assert "out of memory: 1 GiB" in shown and "FLOPs allow 24.0%" in shown


def test_a_comparison_of_two_calls_says_so() -> None:
    def line(bare: int, engine: int) -> str:
        records = [
            {"preset": "3b/lpa", "loop": loop, "step_ms": {"median": 1.0}, "call": call}
            for loop, call in (("bare", bare), ("engine", engine))
        ]
        return comparisons(records, {})[0]["what"]

    assert line(1, 1) == line(2, 2) == "3b/lpa: engine slower than bare loop"
    assert line(2, 1) == "3b/lpa: engine slower than bare loop (calls 1 and 2)"
