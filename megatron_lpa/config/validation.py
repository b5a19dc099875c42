"""Every check that needs more than one value's type, so that a bad run fails before processes start.

A message gives the key, its value and the way out. Nothing here needs torch, a GPU or the data files.
"""

from __future__ import annotations

import math

from megatron_lpa.config.data_validation import at_least, check_data, positive
from megatron_lpa.config.model import INPUT_PROJECTIONS, OUTPUT_PROJECTIONS, ModelConfig, ProjectionConfig
from megatron_lpa.config.run import LoggingConfig, OptimConfig, RunConfig, TrainConfig
from megatron_lpa.errors import UserError


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
    if config.train.epochs is not None and config.data.blend is not None:
        raise UserError(
            f"train.epochs is {config.train.epochs} but the datasets of data.blend each have epochs of their own; "
            "set train.tokens or train.steps instead"
        )
    _check_logging(config.logging)
    if world_size is not None:
        _check_world(config, world_size)
    return _rank_warnings(config.model) + _run_warnings(config, need_data)


def _share(key: str, value: float, *, below_one: bool) -> None:
    """Check a value in [0, 1), or in [0, 1]."""
    if not (0 <= value < 1 or (value == 1 and not below_one)):
        raise UserError(
            f"{key} is {value} but must be at least 0 and {'below' if below_one else 'at most'} 1"
        )


def _divisors(number: int, limit: int = 1024) -> str:
    return ", ".join(str(n) for n in range(1, min(number, limit) + 1) if number % n == 0)


def projections_of(model: ModelConfig) -> dict[str, ProjectionConfig]:
    """The spec of every linear that the model has, by name."""
    return {name: getattr(model.projections, name) for name in model.projection_widths()}


def _check_model(model: ModelConfig) -> None:
    for name in (
        *("vocab_size", "pad_vocab_to_multiple_of", "sequence_length", "hidden_size"),
        *("num_layers", "num_heads", "kv_heads", "ffn_hidden_size"),
    ):
        at_least(f"model.{'num_kv_heads' if name == 'kv_heads' else name}", getattr(model, name), 1)
    for name in ("norm_eps", "rope_base", "init_std"):
        positive(f"model.{name}", getattr(model, name))
    _share("model.dropout", model.dropout, below_one=True)
    if model.num_heads % model.kv_heads:
        raise UserError(
            f"model.num_kv_heads is {model.kv_heads} but must divide model.num_heads {model.num_heads}; "
            f"use one of {_divisors(model.num_heads)}"
        )
    if model.head_dim is None and model.hidden_size % model.num_heads:
        raise UserError(
            f"model.hidden_size {model.hidden_size} is not divisible by model.num_heads {model.num_heads}; "
            "change one of them, or set model.head_dim"
        )
    at_least("model.head_dim", model.head_width, 1)
    if model.position_embedding == "rope" and model.head_width % 2:
        raise UserError(
            f"model.head_dim is {model.head_width} but model.position_embedding rope rotates pairs; "
            "use an even head width, or learned positions"
        )
    for name in (*INPUT_PROJECTIONS, *OUTPUT_PROJECTIONS):
        _check_projection(name, getattr(model.projections, name))
    if model.activation != "swiglu" and model.projections.gate.kind != "dense":
        raise UserError(
            f"model.projections.gate.kind is {model.projections.gate.kind} but model.activation "
            f"{model.activation} has no gate; set it to dense, or model.activation to swiglu"
        )


def _check_projection(name: str, projection: ProjectionConfig) -> None:
    key = f"model.projections.{name}"
    if projection.kind == "dense":
        if projection.rank is not None:
            raise UserError(
                f"{key}.rank is {projection.rank} but {key}.kind is dense; set the kind to lowdim, or the "
                "rank to null"
            )
    elif projection.rank is None:
        raise UserError(f"{key}.kind is {projection.kind} but {key}.rank is empty; set the rank")
    else:
        at_least(f"{key}.rank", projection.rank, 1)


def _check_tensor_parallel(config: RunConfig) -> None:
    model, size = config.model, config.parallel.tensor_parallel_size
    at_least("parallel.tensor_parallel_size", size, 1)
    split = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }
    for name, projection in projections_of(model).items():
        if projection.kind == "lowdim":
            assert projection.rank is not None
            split[f"model.projections.{name}.rank"] = projection.rank
    for key, value in split.items():
        if value % size:
            common = math.gcd(*split.values())
            raise UserError(
                f"{key} {value} is not divisible by parallel.tensor_parallel_size {size}; make it a multiple "
                f"of {size}, or use a tensor-parallel size that divides everything: {_divisors(common, 64)}"
            )
    forced = config.kernels.lowdim not in ("auto", "eager")
    if forced and size > 1 and config.parallel.lowdim_layout == "latent":
        raise UserError(
            f"kernels.lowdim is {config.kernels.lowdim} but with parallel.tensor_parallel_size {size} and "
            "parallel.lowdim_layout latent a collective comes between the two products; set "
            "parallel.lowdim_layout to rank, or kernels.lowdim to auto"
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
    for name, value in given.items():
        positive(f"train.{name}", value)
    for name in ("global_batch_size", "micro_batch_size"):
        at_least(f"train.{name}", getattr(train, name), 1)
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
        "step_timeout_s",
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
    chunk = train.micro_batch_size * data_parallel_size

    def whole(
        sequences: int,
    ) -> bool:  # fewer than a micro-batch for each process are made one (fitted_to_world)
        share, rest = divmod(sequences, data_parallel_size)
        return not rest and (share < train.micro_batch_size or not share % train.micro_batch_size)

    batch = train.global_batch_size
    below = next((n for n in range(batch - 1, 0, -1) if whole(n)), 0)
    above = next(n for n in range(batch + 1, batch + chunk + 1) if whole(n))
    nearest = [n for n in (below, above) if n > 0]
    micro = [
        n
        for n in range(1, train.global_batch_size + 1)
        if train.global_batch_size % (n * data_parallel_size) == 0
    ]
    closest = sorted(sorted(micro, key=lambda n: abs(n - train.micro_batch_size))[:2])
    by_micro = f", or train.micro_batch_size to {' or '.join(map(str, closest))}" if closest else ""
    raise UserError(
        f"train.global_batch_size {train.global_batch_size} is not divisible by train.micro_batch_size "
        f"{train.micro_batch_size} x data-parallel size {data_parallel_size} = {chunk}; set it to "
        f"{' or '.join(map(str, nearest))}{by_micro}"
    )


def _check_logging(logging: LoggingConfig) -> None:
    at_least("logging.interval", logging.interval, 1)
    if logging.peak_tflops is not None:
        positive("logging.peak_tflops", logging.peak_tflops)
    name = logging.name
    if name is not None and (name in ("", ".", "..") or "/" in name):
        raise UserError(
            f"logging.name is {name!r} but names one folder inside logging.run_dir; use a name without '/'"
        )


def _check_world(config: RunConfig, world_size: int) -> None:
    at_least("the world size", world_size, 1)
    tensor_parallel_size = config.parallel.tensor_parallel_size
    if world_size % tensor_parallel_size:
        raise UserError(
            f"parallel.tensor_parallel_size is {tensor_parallel_size} but does not divide the world size "
            f"{world_size}; start a multiple of {tensor_parallel_size} processes, or use one of "
            f"{_divisors(world_size)}"
        )
    data_parallel_size = world_size // tensor_parallel_size
    if config.train.global_batch_size % (config.train.micro_batch_size * data_parallel_size):
        _raise_batch(config.train, data_parallel_size)


def _rank_warnings(model: ModelConfig) -> list[str]:
    warnings = []
    widths = model.projection_widths()
    for name, projection in projections_of(model).items():
        d_in, d_out = widths[name]
        if projection.rank is not None and projection.rank * (d_in + d_out) >= d_in * d_out:
            warnings.append(
                f"model.projections.{name}.rank is {projection.rank}: the pair has as many parameters as the "
                f"dense {d_out} x {d_in} matrix or more; it saves from "
                f"{(d_in * d_out - 1) // (d_in + d_out)} down"
            )
    return warnings


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
    has_valid = data.valid_prefix is not None or (
        data.train_prefix is None and float(data.split.split(",")[1]) > 0
    )
    if need_data and train.eval_interval and not has_valid:
        warnings.append(
            f"train.eval_interval is {train.eval_interval} but there is no validation data "
            "(data.valid_prefix, or the second share of data.split): no validation will run"
        )
    return warnings
