"""Combinations that cannot work are refused with the key, the value and the way out."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from megatron_lpa.config import RunConfig, fitted_to_world, load_config, validate_config
from megatron_lpa.errors import UserError

BASE = ["--preset", "s2_small/lpa", "--data.prefix", "pile"]
"""12 heads of 64, FFN 2048, r = 128 on q, k, v, o, vocabulary 32000, batch 320 in micro-batches of 20."""


def warnings_of(*overrides: str, world_size: int | None = None) -> list[str]:
    return validate_config(load_config([*BASE, *overrides]), world_size)


def refusal(*overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        warnings_of(*overrides, world_size=world_size)
    return str(error.value)


def test_a_good_config_passes_without_warnings() -> None:
    assert warnings_of(world_size=16) == []
    assert warnings_of("--parallel.tensor_parallel_size=4", world_size=8) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--model.hidden_size=0"], ["model.hidden_size is 0", "at least 1"]),
        (["--model.num_layers=-1"], ["model.num_layers is -1"]),
        (["--model.num_kv_heads=5"], ["model.num_kv_heads is 5", "1, 2, 3, 4, 6, 12"]),
        (["--model.num_heads=7"], ["model.hidden_size 768", "model.num_heads 7", "model.head_dim"]),
        (["--model.head_dim=63"], ["model.head_dim is 63", "rope", "even"]),
        (["--model.dropout=1.0"], ["model.dropout is 1.0", "below 1"]),
        (["--model.dropout=-0.1"], ["model.dropout is -0.1"]),
        (["--model.norm_eps=0"], ["model.norm_eps", "above 0"]),
        (["--model.projections.up.kind=lowdim"], ["model.projections.up.rank is empty", "set the rank"]),
        (["--model.projections.q.kind=dense"], ["model.projections.q.rank is 128", "dense", "null"]),
        (["--model.projections.q.rank=0"], ["model.projections.q.rank is 0"]),
        (
            [
                "--model.activation=relu",
                "--model.projections.gate.kind=lowdim",
                "--model.projections.gate.rank=8",
            ],
            ["model.projections.gate.kind", "relu", "swiglu"],
        ),
        (["--data.train_prefix=other"], ["data.prefix pile", "data.train_prefix other", "exclude"]),
        (["--data.valid_prefix=other"], ["data.valid_prefix is other", "data.train_prefix"]),
        (["--data.prefix=null"], ["data.prefix, data.blend and data.train_prefix", "all empty"]),
        (["--data.blend={b: 1}"], ["data.prefix pile", "data.blend {'b': 1.0}", "exclude each other"]),
        (["--data.prefix=null", "--data.blend={}"], ["data.blend is {}", "at least one"]),
        (
            ["--data.prefix=null", "--data.blend={a: 1, b: 0}"],
            ["data.blend gives b the weight 0.0", "above 0"],
        ),
        (["--data.prefix=null", "--data.blend={a: .nan}"], ["data.blend gives a the weight nan"]),
        (["--data.prefix=null", "--data.blend={a: -1}"], ["data.blend gives a the weight -1.0"]),
        (
            ["--data.prefix=null", "--data.blend={a: 1}", "--data.valid_prefix=v"],
            ["data.valid_prefix is v", "data.train_prefix is empty"],
        ),
        (
            ["--data.prefix=null", "--data.blend={a: 1}", "--train.epochs=2"],
            ["train.epochs is 2.0", "data.blend", "train.tokens"],
        ),
        (["--data.document_seed=-1"], ["data.document_seed is -1"]),
        (["--data.document_seed=9223372036854775808"], ["data.document_seed", "2**63"]),
        (["--data.index_timeout_s=0"], ["data.index_timeout_s is 0", "above 0"]),
        (["--data.split=9,1"], ["data.split is '9,1'", "969,30,1"]),
        (["--data.split=0,1,1"], ["data.split", "first above 0"]),
        (["--data.split=9,-1,1"], ["data.split", "negative"]),
        (["--data.split=a,b,c"], ["data.split is 'a,b,c'"]),
        (["--optim.lr=0"], ["optim.lr is 0", "above 0"]),
        (["--optim.warmup_steps=-1"], ["optim.warmup_steps is -1"]),
        (["--optim.beta2=1.0"], ["optim.beta2 is 1.0", "below 1"]),
        (["--optim.min_lr_ratio=1.5"], ["optim.min_lr_ratio is 1.5", "at most 1"]),
        (["--optim.decay_steps=1000"], ["optim.decay_steps is 1000", "optim.warmup_steps 1000"]),
        (["--train.steps=null"], ["exactly one", "none of them"]),
        (["--train.steps=5", "--train.epochs=2"], ["exactly one", "train.steps 5 and train.epochs 2"]),
        (["--train.steps=0"], ["train.steps is 0"]),
        (["--train.eval_interval=-5"], ["train.eval_interval is -5", "at least 0"]),
        (["--logging.interval=0"], ["logging.interval is 0", "at least 1"]),
        (["--logging.name=a/b"], ["logging.name is 'a/b'", "without '/'"]),
        (["--logging.peak_tflops=0"], ["logging.peak_tflops"]),
    ],
)
def test_impossible_values_are_refused(overrides: list[str], expected: list[str]) -> None:
    text = refusal(*overrides)
    assert all(part in text for part in expected), text


@pytest.mark.parametrize(
    ("size", "overrides", "expected"),
    [
        (8, [], ["model.num_heads 12", "parallel.tensor_parallel_size 8", "1, 2, 4"]),
        (4, ["--model.num_kv_heads=2"], ["model.num_kv_heads 2", "multiple of 4"]),
        (4, ["--model.projections.k.rank=66"], ["model.projections.k.rank 66", "multiple of 4"]),
        (4, ["--model.projections.k.rank=66", "--parallel.lowdim_layout=rank"], ["projections.k.rank 66"]),
        (4, ["--model.ffn_hidden_size=2050"], ["model.ffn_hidden_size 2050"]),
        (4, ["--model.vocab_size=32001"], ["32001", "model.pad_vocab_to_multiple_of to 4"]),
        # 32001 ids in rows of 6 are 32004, which 8 does not divide; lcm(6, 8) = 24.
        (
            8,
            ["--model.num_heads=16", "--model.vocab_size=32001", "--model.pad_vocab_to_multiple_of=6"],
            ["32004", "to 24"],
        ),
    ],
)
def test_tensor_parallelism_must_divide_what_it_splits(
    size: int, overrides: list[str], expected: list[str]
) -> None:
    text = refusal(f"--parallel.tensor_parallel_size={size}", *overrides)
    assert all(part in text for part in expected), text


def test_padding_makes_an_odd_vocabulary_divisible() -> None:
    overrides = ["--model.vocab_size=32001", "--model.pad_vocab_to_multiple_of=4"]
    assert warnings_of("--parallel.tensor_parallel_size=4", *overrides) == []


def test_the_world_must_hold_whole_models() -> None:
    text = refusal("--parallel.tensor_parallel_size=4", world_size=6)
    assert "parallel.tensor_parallel_size is 4" in text and "world size 6" in text and "1, 2, 3, 6" in text
    assert warnings_of("--parallel.tensor_parallel_size=4") == []  # the world size is not known yet


def test_the_batch_must_be_whole_and_near_values_are_offered() -> None:
    # 20 sequences x 6 processes = 120; 320 lies between 240 and 360. No micro-batch makes 320 / 6 whole.
    text = refusal(world_size=6)
    assert "train.global_batch_size 320" in text and "= 120; set it to 240 or 360" in text
    assert "train.micro_batch_size to" not in text
    # 20 x 32 = 640. Below, a process gets fewer than 20, which is fine: 9 or 11 for each, or micro-batches of
    # 10.
    text = refusal(world_size=32)
    assert "set it to 288 or 352, or train.micro_batch_size to 5 or 10" in text
    for batch in (288, 352):
        fitted, _ = fitted_to_world(load_config([*BASE, f"--train.global_batch_size={batch}"]), 32)
        assert validate_config(fitted, 32) == [] and fitted.train.global_batch_size == batch
    # Tensor-parallel ranks share one batch: 12 processes of TP 4 are 3 data-parallel ranks.
    text = refusal("--parallel.tensor_parallel_size=4", world_size=12)
    assert "data-parallel size 3 = 60; set it to 300 or 360" in text
    assert "train.micro_batch_size 7" in refusal("--train.micro_batch_size=7")


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([], 16, 20),  # 320 sequences: 20 for each
        ([], 32, 10),
        ([], 320, 1),
        ([], 640, 20),  # half a sequence for each: left to be refused
        ([], 6, 20),
        (["--parallel.tensor_parallel_size=4"], 32, 20),  # 8 data-parallel ranks get 40 each
        (["--parallel.tensor_parallel_size=4"], 128, 10),
        (["--parallel.tensor_parallel_size=4"], 6, 20),
        (["--train.micro_batch_size=8"], 32, 8),  # two of 10 would not fit: refused, and never made larger
    ],
)
def test_with_more_processes_than_micro_batches_each_takes_less(
    overrides: list[str], world_size: int, expected: int
) -> None:
    config = load_config([*BASE, *overrides])
    fitted, notes = fitted_to_world(config, world_size)
    assert fitted.train.micro_batch_size == expected
    assert bool(notes) == (fitted != config)
    if notes:
        assert f"it is {expected} in this run" in notes[0]
        assert validate_config(fitted, world_size) == []
        assert replace(fitted, train=config.train) == config


def test_planning_needs_no_data_but_pretraining_does() -> None:
    config = load_config(["--preset", "3b/lpa"])
    assert validate_config(config, 16, need_data=False) == []
    with pytest.raises(UserError, match=r"data\.prefix"):
        validate_config(config, 16)


def test_a_rank_that_saves_nothing_is_warned_about() -> None:
    # q is 768 x 768: r = 384 has exactly as many parameters as the dense matrix, 383 fewer.
    assert warnings_of("--model.projections.q.rank=383") == []
    (warning,) = warnings_of("--model.projections.q.rank=384")
    assert "model.projections.q.rank is 384" in warning and "383" in warning


def test_suspicious_runs_are_warned_about() -> None:
    (warning,) = warnings_of("--train.steps=10")
    assert "optim.warmup_steps is 1000" in warning and "10 steps" in warning
    assert warnings_of("--train.tokens=81920000") == []  # 1000 steps of 320 x 256 tokens reach the peak
    (warning,) = warnings_of("--train.tokens=81838080")  # one step fewer
    assert "999 steps" in warning
    (warning,) = warnings_of("--optim.decay_steps=40000")
    assert "optim.decay_steps is 40000" in warning
    (warning,) = warnings_of("--data.split=9,0,1")
    assert "no validation" in warning
    assert warnings_of("--data.split=9,0,1", "--train.eval_interval=0") == []
    (warning,) = warnings_of("--data.prefix=null", "--data.train_prefix=t")
    assert "data.valid_prefix" in warning
    assert warnings_of("--data.prefix=null", "--data.blend={a: 2, b/c.d: 1}") == []


def test_keeping_the_best_says_where_validation_and_checkpoints_do_not_meet() -> None:
    keep = ("--train.keep_best=true", "--train.steps=30", "--optim.warmup_steps=4")
    assert warnings_of(*keep, "--train.eval_interval=5", "--train.checkpoint_interval=10") == []
    for evaluate, save in ((7, 10), (10, 20), (30, 40), (5, 0)):
        intervals = (f"--train.eval_interval={evaluate}", f"--train.checkpoint_interval={save}")
        found = warnings_of(*keep, *intervals)
        assert len(found) == (0 if (evaluate, save) == (10, 20) else 1)
        assert all("meet at the last step only" in warning and "keep_best" in warning for warning in found)
    (warning,) = warnings_of(*keep, "--train.eval_interval=4", "--train.checkpoint_interval=6")
    assert "meet every 12 steps only" in warning and "a multiple of train.eval_interval" in warning


def test_nan_in_a_hand_built_config_is_refused() -> None:
    config = load_config(BASE)
    broken = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=float("nan")))
    with pytest.raises(UserError, match=r"optim\.lr is nan"):
        validate_config(broken, None)


def test_defaults_alone_lack_a_length_and_data() -> None:
    with pytest.raises(UserError, match=r"exactly one of train\.steps"):
        validate_config(RunConfig(), None, need_data=False)


@pytest.mark.parametrize("path", ["joined", "fused"])
def test_a_forced_path_needs_both_factors_in_one_place(path):
    forced = f"--kernels.lowdim={path}"
    assert warnings_of(forced) == []
    assert warnings_of(forced, "--parallel.tensor_parallel_size=4", "--parallel.lowdim_layout=rank") == []
    text = refusal(forced, "--parallel.tensor_parallel_size=4", "--parallel.lowdim_layout=latent")
    assert (
        f"kernels.lowdim is {path}" in text
        and "set parallel.lowdim_layout to column_row, or kernels.lowdim to auto" in text
    )
