"""Every check that needs more than one value's type, so that a bad run fails before processes start.

A message gives the key, its value and the way out. Nothing here needs torch, a GPU or the data files.
"""

from __future__ import annotations

import math
import struct

from megatron_lpa.config.data_validation import (
    MOST_NAME_BYTES,
    check_data,
    check_path,
)
from megatron_lpa.config.model import ModelConfig
from megatron_lpa.config.projection_validation import (
    check_projections,
    rank_warnings,
    split_sizes,
)
from megatron_lpa.config.run import LoggingConfig, OptimConfig, RunConfig, TrainConfig
from megatron_lpa.errors import UserError, shown
from megatron_lpa.number_checks import MOST_SIZE, at_least, at_most, divisors, positive


def validate_config(config: RunConfig, world_size: int | None, *, need_data: bool = True) -> list[str]:
    """Check a configuration as a whole.

    Args:
        config: what ``load_config`` returned, or a hand-built configuration.
        world_size: number of processes; None skips what depends on it.
        need_data: whether the run reads a dataset; planning does not.

    Returns:
        Warnings: combinations that run but are probably not meant.

    Raises:
        UserError: a value, or a combination of values, that cannot work.
    """
    _check_model(config.model)
    _check_tensor_parallel(config)
    check_data(config.data, need_data)
    _check_optim(config.optim)
    _check_train(config.train)
    if config.model.sequence_length == 1 and not config.train.predict_next_block:
        raise UserError(
            "train.predict_next_block is false but model.sequence_length is 1: no label is left; make the "
            "sequences longer, or set it to true"
        )
    if config.train.epochs is not None and config.data.blend is not None:
        raise UserError(
            f"train.epochs is {config.train.epochs} but the datasets of data.blend each have epochs of their "
            "own; set train.tokens or train.steps instead"
        )
    steps = planned_steps(config.train, config.model)
    if (
        steps is not None
        and steps * config.train.global_batch_size * config.model.sequence_length > MOST_TOKENS
    ):
        raise UserError(
            f"the run's {steps:,} steps of train.global_batch_size x model.sequence_length tokens are more "
            "than 2**62 tokens; lower train.steps or train.tokens"
        )
    _check_logging(config.logging)
    if world_size is not None:
        _check_world(config, world_size)
    return rank_warnings(config.model) + _run_warnings(config, need_data)


MOST_TIMEOUT_S = 10**8
"""Three years. Timers of the operating system end somewhere above."""

MOST_EPOCHS = 10**9
MOST_TOKENS = 2**62
"""Of a run: positions in the data are 64-bit integers."""


def _share(key: str, value: float, *, below_one: bool) -> None:
    """Check a value in [0, 1), or in [0, 1], as float32 has it: 1 - 1e-9 is 1 there."""
    if not 0 <= value <= 1 or (below_one and struct.unpack("f", struct.pack("f", value))[0] == 1):
        raise UserError(
            f"{key} is {value} but must be at least 0 and {'below' if below_one else 'at most'} 1"
        )


def _check_model(model: ModelConfig) -> None:
    for name in (
        *("vocab_size", "pad_vocab_to_multiple_of", "sequence_length", "hidden_size"),
        *("num_layers", "num_heads", "kv_heads", "ffn_hidden_size"),
    ):
        key = f"model.{'num_kv_heads' if name == 'kv_heads' else name}"
        at_least(key, getattr(model, name), 1)
        at_most(key, getattr(model, name), MOST_SIZE)
    for name in ("norm_eps", "rope_base", "init_std"):
        positive(f"model.{name}", getattr(model, name))
    _share("model.dropout", model.dropout, below_one=True)
    if model.num_heads % model.kv_heads:
        raise UserError(
            f"model.num_kv_heads is {model.kv_heads} but must divide model.num_heads {model.num_heads}; "
            f"use one of {divisors(model.num_heads)}"
        )
    if model.head_dim is None and model.hidden_size % model.num_heads:
        raise UserError(
            f"model.hidden_size {model.hidden_size} is not divisible by model.num_heads {model.num_heads}; "
            "change one of them, or set model.head_dim"
        )
    at_least("model.head_dim", model.head_width, 1)
    at_most("model.head_dim", model.head_width, MOST_SIZE)
    if model.position_embedding == "rope" and model.head_width % 2:
        raise UserError(
            f"model.head_dim is {model.head_width} but model.position_embedding rope rotates pairs; "
            "use an even head width, or learned positions"
        )
    check_projections(model)


def _check_tensor_parallel(config: RunConfig) -> None:
    model, size = config.model, config.parallel.tensor_parallel_size
    at_least("parallel.tensor_parallel_size", size, 1)
    split = split_sizes(model)
    for key, value in split.items():
        if value % size:
            common = math.gcd(*split.values())
            raise UserError(
                f"{key} {value} is not divisible by parallel.tensor_parallel_size {size}; make it a multiple "
                f"of {size}, or use a tensor-parallel size that divides everything: {divisors(common, 64)}"
            )
    forced = config.kernels.lowdim not in ("auto", "eager")
    if forced and size > 1 and config.parallel.lowdim_layout == "latent":
        raise UserError(
            f"kernels.lowdim is {config.kernels.lowdim} but with parallel.tensor_parallel_size {size} and "
            "parallel.lowdim_layout latent a collective comes between the two products; set "
            "parallel.lowdim_layout to column_row, or kernels.lowdim to auto"
        )
    if model.padded_vocab_size % size:
        multiple = math.lcm(model.pad_vocab_to_multiple_of, size)
        raise UserError(
            f"the padded vocabulary of {model.padded_vocab_size} ids (model.vocab_size {model.vocab_size}) "
            f"is not divisible by parallel.tensor_parallel_size {size}; set model.pad_vocab_to_multiple_of "
            f"to {multiple}"
        )


def _check_optim(optim: OptimConfig) -> None:
    for name in ("lr", "eps"):
        positive(f"optim.{name}", getattr(optim, name))
    for name in ("warmup_steps", "weight_decay", "grad_clip"):
        at_least(f"optim.{name}", getattr(optim, name), 0)
    for name in ("beta1", "beta2"):
        _share(f"optim.{name}", getattr(optim, name), below_one=True)
    for name in ("min_lr_ratio", "wsd_decay_fraction"):
        _share(f"optim.{name}", getattr(optim, name), below_one=False)
    if optim.lr * optim.weight_decay >= 1:
        raise UserError(
            f"optim.weight_decay is {shown(optim.weight_decay)} but times optim.lr {shown(optim.lr)} must be "
            "below 1: each step takes that share of every weight away; lower one of them"
        )
    if optim.decay_steps is not None and optim.decay_steps <= optim.warmup_steps:
        raise UserError(
            f"optim.decay_steps is {optim.decay_steps} but the schedule only leaves its warm-up at "
            f"optim.warmup_steps {optim.warmup_steps}; raise the first, lower the second, or set "
            "optim.decay_steps to null for the last step"
        )


def _check_train(train: TrainConfig) -> None:
    lengths = {name: getattr(train, name) for name in ("steps", "tokens", "epochs")}
    given = {name: value for name, value in lengths.items() if value is not None}
    if len(given) != 1:
        found = " and ".join(f"train.{name} {value}" for name, value in given.items()) or "none of them"
        raise UserError(f"set exactly one of train.steps, train.tokens and train.epochs; found {found}")
    at_most("train.epochs", train.epochs or 0, MOST_EPOCHS)
    for name, value in given.items():
        positive(f"train.{name}", value)
    for name in ("global_batch_size", "micro_batch_size"):
        at_least(f"train.{name}", getattr(train, name), 1)
        at_most(f"train.{name}", getattr(train, name), MOST_SIZE)
    for name in ("start_timeout_s", "step_timeout_s"):
        seconds = getattr(train, name)
        at_most(f"train.{name}", seconds, MOST_TIMEOUT_S, "0 waits for ever")
        at_least(f"train.{name}", seconds, 0)
        if 0 < seconds < 1:
            raise UserError(
                f"train.{name} is {seconds}, less than a second; give seconds, or 0 to wait for ever"
            )
    if train.lock_wait_s is not None:
        at_most("train.lock_wait_s", train.lock_wait_s, MOST_TIMEOUT_S)
        at_least("train.lock_wait_s", train.lock_wait_s, 0)
    check_path("train.deepspeed_config", train.deepspeed_config)
    for name in (
        "seed",
        "eval_interval",
        "eval_batches",
        "checkpoint_interval",
        "keep_checkpoints",
        "keep_every",
        "max_skipped_steps",
        "max_rollbacks",
        "loss_spike",
    ):
        at_least(f"train.{name}", getattr(train, name), 0)
    if train.keep_best and not train.eval_interval:
        raise UserError(
            "train.keep_best needs validation losses but train.eval_interval is 0; set an interval, or "
            "train.keep_best to false"
        )
    if train.global_batch_size % train.micro_batch_size:
        _raise_batch(train, 1)


def _raise_batch(train: TrainConfig, data_parallel_size: int) -> None:
    batch, micro_batch = train.global_batch_size, train.micro_batch_size
    chunk = micro_batch * data_parallel_size
    # Sequences for each process: multiples of a micro-batch, or fewer, which are made one (fitted_to_world).
    below = (batch - 1) // data_parallel_size
    above = batch // data_parallel_size + 1
    shares = [
        below if below < micro_batch else below - below % micro_batch,
        above if above < micro_batch else -(-above // micro_batch) * micro_batch,
    ]
    nearest = [share * data_parallel_size for share in shares if share > 0]
    micro = [] if batch % data_parallel_size else _all_divisors(batch // data_parallel_size)
    closest = sorted(sorted(micro, key=lambda n: abs(n - micro_batch))[:2])
    by_micro = f", or train.micro_batch_size to {' or '.join(map(str, closest))}" if closest else ""
    raise UserError(
        f"train.global_batch_size {batch} is not divisible by train.micro_batch_size "
        f"{micro_batch} x data-parallel size {data_parallel_size} = {chunk}; set it to "
        f"{' or '.join(map(str, nearest))}{by_micro}"
    )


def _all_divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _check_logging(logging: LoggingConfig) -> None:
    at_least("logging.interval", logging.interval, 1)
    if logging.peak_tflops is not None:
        positive("logging.peak_tflops", logging.peak_tflops)
    check_path("logging.run_dir", logging.run_dir)
    if (name := logging.name) is not None:
        size = len(name.encode(errors="surrogateescape"))
        if name in ("", ".", "..") or "/" in name or size > MOST_NAME_BYTES:
            raise UserError(
                f"logging.name is {shown(name)} but names one folder inside logging.run_dir; use a name "
                f"without '/', of 1 to {MOST_NAME_BYTES} bytes"
            )
    project = logging.wandb_project
    if logging.wandb != "off" and (not 1 <= len(project) <= 128 or set(project) & set("/\\#?%:")):
        raise UserError(
            f"logging.wandb_project is {shown(project)} but W&B takes 1 to 128 characters, none of them of / "
            "\\ # ? % :"
        )


def _check_world(config: RunConfig, world_size: int) -> None:
    at_least("the world size", world_size, 1)
    tensor_parallel_size = config.parallel.tensor_parallel_size
    if world_size % tensor_parallel_size:
        raise UserError(
            f"parallel.tensor_parallel_size is {tensor_parallel_size} but does not divide the world size "
            f"{world_size}; start a multiple of {tensor_parallel_size} processes, or use one of "
            f"{divisors(world_size)}"
        )
    data_parallel_size = world_size // tensor_parallel_size
    if config.train.global_batch_size % (config.train.micro_batch_size * data_parallel_size):
        _raise_batch(config.train, data_parallel_size)


def planned_steps(train: TrainConfig, model: ModelConfig) -> int | None:
    """Optimizer steps of a run; None for ``train.epochs``, whose length only the data tells."""
    if train.tokens is not None:
        return -(-train.tokens // (train.global_batch_size * model.sequence_length))
    return train.steps


def _run_warnings(config: RunConfig, need_data: bool) -> list[str]:
    train, data, optim = config.train, config.data, config.optim
    warnings = []
    steps = planned_steps(train, config.model)
    if steps is not None and optim.warmup_steps > steps:
        warnings.append(
            f"optim.warmup_steps is {optim.warmup_steps} but the run has {steps} steps: the learning rate "
            "never reaches optim.lr"
        )
    if steps is not None and optim.decay_steps is not None and optim.decay_steps > steps:
        warnings.append(
            f"optim.decay_steps is {optim.decay_steps} but the run has {steps} steps: the schedule is cut off"
        )
    warnings += _best_warnings(train, steps)
    has_valid = data.valid_prefix is not None or (
        data.train_prefix is None and float(data.split.split(",")[1]) > 0
    )
    if need_data and train.eval_interval and not has_valid:
        warnings.append(
            f"train.eval_interval is {train.eval_interval} but there is no validation data "
            "(data.valid_prefix, or the second share of data.split): no validation will run"
        )
    return warnings


def _best_warnings(train: TrainConfig, steps: int | None) -> list[str]:
    """Where validation and checkpoints meet too late for a best one to be kept."""
    if not train.keep_best or not train.eval_interval:
        return []
    meet = math.lcm(train.eval_interval, train.checkpoint_interval)
    if train.checkpoint_interval and (steps is None or meet < steps):
        if meet == train.checkpoint_interval:
            return []
        often = (
            f"meet every {meet} steps only: other checkpoints have no validation loss, and are none of the "
            "best"
        )
    else:
        often = "meet at the last step only: it keeps no other checkpoint"
    return [
        f"train.keep_best is true, but validation (train.eval_interval={train.eval_interval}) and "
        f"checkpoints (train.checkpoint_interval={train.checkpoint_interval}) {often}; set "
        "train.checkpoint_interval to a multiple of train.eval_interval, and smaller than the run is long"
    ]
