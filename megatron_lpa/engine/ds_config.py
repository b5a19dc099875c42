"""From a ``RunConfig`` and a file of ZeRO knobs to DeepSpeed's configuration.

The JSON files hold what belongs to the machine (ZeRO stage, bucket sizes, offload). Everything that
decides the result of a run (batch, precision, clipping, optimizer) comes from the ``RunConfig``; a file
that sets one of those is refused rather than silently overridden.
"""

from __future__ import annotations

import difflib
import os
import stat
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_lpa.config import RunConfig
from megatron_lpa.engine.zero_knobs import check_knobs, check_world, parse_strictly
from megatron_lpa.errors import UserError, named, shown
from megatron_lpa.files import LASTING, names_in, patiently, read_json

MOST_BYTES = 1 << 20

_INSTALLED = Path(str(resources.files("megatron_lpa"))) / "ds_configs"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "ds_configs"
"""Inside an installed package (see setup.py), beside it in the repository."""

DECIDED_BY_RUN = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optim.grad_clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "optimizer": "the optim section",
    "scheduler": "optim.schedule",
    "activation_checkpointing": "train.activation_checkpointing",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
    "tensor_parallel": "parallel.tensor_parallel_size",
}
"""DeepSpeed's keys that a file must leave alone, and the run's key that decides instead."""


def find_ds_config(name: str) -> Path:
    """The file that ``train.deepspeed_config`` names: a path, or a name in ``ds_configs/``.

    Raises:
        UserError: no such file, or a folder on the way to it may not be entered.
        TryAgain: the disk does not say whether there is one.
    """
    candidates = [Path(name), Path("ds_configs") / f"{name}.json", SHIPPED / f"{name}.json"]
    for path in candidates:
        if _is_there(path):
            return path
    shipped = [name[:-5] for name in names_in(SHIPPED) if name.endswith(".json")]
    near = difflib.get_close_matches(name[:100], shipped, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"train.deepspeed_config={shown(name)}: no such file and no such name in ds_configs/; {hint}"
        f"names: {', '.join(shipped)}"
    )


def _is_there(path: Path) -> bool:
    """Whether there is anything but a folder; what cannot be a file of JSON is told of when it is read."""
    if "\0" in str(path):
        return False
    try:
        return not stat.S_ISDIR(patiently(lambda: os.stat(path), path).st_mode)
    except PermissionError as error:
        raise UserError(
            f"{named(path)}: {error.strerror}; let this user read it, or name another file"
        ) from error
    except OSError as error:
        if error.errno in LASTING:
            return False
        raise


def read_zero_knobs(name: str, precision: str) -> dict[str, Any]:
    """The contents of a file of ZeRO knobs, checked against the run's precision.

    Raises:
        UserError: missing or malformed file, a key that the run's config decides, or a stage that
            cannot train in this precision.
        TryAgain: the disk does not give the file.
    """
    path = find_ds_config(name)
    try:
        knobs = read_json(path, MOST_BYTES, parse_strictly)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; check the path and its permissions"
        ) from error
    if not isinstance(knobs, dict):
        raise UserError(f"{path}: expected a JSON object with the key 'zero_optimization'")
    for key in knobs:
        if key in DECIDED_BY_RUN:
            raise UserError(
                f"{path}: {key!r} contradicts the run's config; remove it and set {DECIDED_BY_RUN[key]}"
            )
    knobs = check_knobs(path, knobs)
    stage = knobs["zero_optimization"]["stage"]
    if stage == 0 and precision == "bf16":
        raise UserError(
            f"{path}: train.precision=bf16 needs ZeRO stage 1 or above: DeepSpeed's stage 0 accumulates "
            "gradients in bf16 and leaves tensor-parallel shards out of the gradient norm; set "
            "train.deepspeed_config=zero1 (the same memory on one process) or train.precision=fp32 or "
            "bf16_mixed"
        )
    return knobs


def check_zero_file(config: RunConfig, world_size: int) -> None:
    """Whether the file of ZeRO knobs can be used by so many processes; neither DeepSpeed nor PyTorch is
    imported.

    Raises:
        UserError: as ``read_zero_knobs``, or a knob does not fit the number of processes.
        TryAgain: as ``read_zero_knobs``.
    """
    name = config.train.deepspeed_config
    zero = read_zero_knobs(name, config.train.precision)["zero_optimization"]
    check_world(find_ds_config(name), zero, world_size, config.parallel.tensor_parallel_size)


def build_ds_config(config: RunConfig, dp_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run.

    Args:
        config: the run.
        dp_size: data-parallel size.

    Raises:
        UserError: as ``read_zero_knobs``; or a knob that DeepSpeed does not know, or not with this value.
        TryAgain: as ``read_zero_knobs``.
    """
    ds_config = read_zero_knobs(config.train.deepspeed_config, config.train.precision)
    zero = ds_config["zero_optimization"]
    check_by_deepspeed(zero, config.train.deepspeed_config)
    train = config.train
    ds_config |= {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * dp_size),
        "train_batch_size": train.global_batch_size,
        "gradient_clipping": config.optim.grad_clip,
        # For bf16_mixed DeepSpeed trains an fp32 model; autocast is the decoder's (model/transformer.py). Its
        # own, the section torch_autocast, is global to the process and sends gradients of some modules in
        # bf16.
        "bf16": {"enabled": train.precision == "bf16"},
        "steps_per_print": 10**9,
        # Its throughput timer waits for the whole device twice per micro-batch, for a figure that nobody
        # reads.
        "timers": {"throughput": {"enabled": False}},
        # The optimizer is ours to choose (engine/build.py): PyTorch's AdamW, also with offload on a CPU.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if train.precision == "bf16":
        ds_config["data_types"] = {"grad_accum_dtype": "fp32"}
    if zero["stage"] == 3:
        # Unsharded weights are written by our own checkpoint code, as safetensors.
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    return ds_config


ONLY_DEEPSPEED = (
    "zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
)  # fmt: skip
"""Knobs of ZeRO that change what is computed, or where, with one replica too."""


def needs_deepspeed(ds_config: dict[str, Any]) -> bool:
    """Whether something is asked for that only DeepSpeed does, also where there is nothing to partition.

    Args:
        ds_config: what ``build_ds_config`` returned.
    """
    zero = ds_config["zero_optimization"]
    diagnostics = ds_config.get("wall_clock_breakdown") or ds_config.get("memory_breakdown")
    return bool(
        any(offloads(ds_config, key) for key in ("offload_optimizer", "offload_param"))
        or any(zero.get(key) for key in ONLY_DEEPSPEED)
        or diagnostics
        or ds_config.get("comms_logger", {}).get("enabled")
    )


def offloads(ds_config: dict[str, Any], key: str) -> bool:
    """Whether ``offload_optimizer`` or ``offload_param`` is there: ``check_knobs`` leaves one to nowhere
    out."""
    return key in ds_config["zero_optimization"]


def check_by_deepspeed(zero: dict[str, Any], name: str) -> None:
    """Ask the installed DeepSpeed, which may be another than ``zero_knobs`` was written for.

    Args:
        zero: the knobs that ``read_zero_knobs`` gives as ``zero_optimization``.
        name: the run's ``train.deepspeed_config``, for messages.

    Raises:
        UserError: it does not take one of them.
    """
    # Here, as the file is read before seconds of imports.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(
            f"{find_ds_config(name)}: {named(key)} is {shown(first['input'])}: {named(first['msg'])}; "
            "correct or remove it"
        ) from error
