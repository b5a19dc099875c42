"""DeepSpeed's knobs of ZeRO as a file may give them: names, types and ranges.

DeepSpeed's own models say the same, but only after seconds of imports, and they turn ``"false"`` or
``"auto"`` into something else without a word. This table needs neither DeepSpeed nor PyTorch, so that a
mistake is told before anything starts. ``tests/unit/engine/test_zero_knobs.py`` compares it with the
installed DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lpa.errors import UserError, shown

MOST_BUCKET = 10**12
"""Of elements: a buffer of more is on no machine."""

MOST = 2**63 - 1
"""Sizes become 64-bit integers."""


@dataclass(frozen=True)
class Knob:
    """What a value may be.

    Args:
        kind: ``bool``, ``int``, ``float``, ``str``, or ``list``, of texts.
        low, high: of a number.
        optional: it may be null as well.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    optional: bool = False

    @property
    def expected(self) -> str:
        """In words, for messages."""
        if self.kind is bool:
            return "true or false, without quotes"
        if self.kind is str:
            return "a text"
        if self.kind is list:
            return "a list of texts"
        words = "a whole number" if self.kind is int else "a number"
        if math.isfinite(self.high):
            return f"{words} from {self.low:g} to {self.high:g}"
        if self.low == 1:
            return f"{words} greater than 0"
        return f"{words}, at least {self.low:g}" if math.isfinite(self.low) else words

    def value_of(self, given: Any) -> Any:
        """``given`` as this kind; ``None`` where it is of another."""
        if self.kind is bool or self.kind is str:
            return given if type(given) is self.kind else None
        if self.kind is list:
            return given if isinstance(given, list) and all(isinstance(one, str) for one in given) else None
        # Not a number is within no limits; a whole number may be too long for a float.
        if type(given) not in (int, float) or not max(self.low, -MOST) <= given <= min(self.high, MOST):
            return None
        if self.kind is int:
            return int(given) if given == int(given) else None
        return float(given)


BOOL, WHOLE, TEXTS = Knob(bool), Knob(int, 0), Knob(list)
SHARE = Knob(float, 0, 1)

ZERO: dict[str, Knob] = {
    "stage": Knob(int, 0, 3),
    "contiguous_gradients": BOOL,
    "reduce_scatter": BOOL,
    "reduce_bucket_size": Knob(int, 1),
    "use_multi_rank_bucket_allreduce": BOOL,
    "allgather_partitions": BOOL,
    "allgather_bucket_size": WHOLE,
    "overlap_comm": Knob(bool, optional=True),
    "load_from_fp32_weights": BOOL,
    "elastic_checkpoint": BOOL,
    "sub_group_size": WHOLE,
    "stage3_prefetch_bucket_size": WHOLE,
    "stage3_param_persistence_threshold": WHOLE,
    "stage3_model_persistence_threshold": WHOLE,
    "stage3_max_live_parameters": WHOLE,
    "stage3_max_reuse_distance": WHOLE,
    "stage3_gather_16bit_weights_on_model_save": BOOL,
    "stage3_module_granularity_threshold": Knob(int),
    "stage3_use_all_reduce_for_fetch_params": BOOL,
    "stage3_allgather_sequential": BOOL,
    "ignore_unused_parameters": BOOL,
    "round_robin_gradients": BOOL,
    "parameter_alignment": BOOL,
    "zero_hpz_partition_size": WHOLE,
    "zero_quantized_weights": BOOL,
    "zero_quantized_nontrainable_weights": BOOL,
    "zero_quantized_gradients": BOOL,
    "memory_efficient_linear": BOOL,
    "pipeline_loading_checkpoint": BOOL,
    "override_module_apply": BOOL,
    "log_trace_cache_warnings": BOOL,
    "enable_sanity_checks": BOOL,
    "save_muon_momentum_buffer_in_memory": BOOL,
}
"""Values of ``zero_optimization``. DeepSpeed knows those that begin with ``stage3_`` without that, too."""

OFFLOAD_OPTIMIZER: dict[str, Knob] = {
    "device": Knob(str),
    "nvme_path": Knob(str, optional=True),
    "buffer_count": WHOLE,
    "pin_memory": BOOL,
    "pipeline_read": BOOL,
    "pipeline_write": BOOL,
    "fast_init": BOOL,
    "ratio": SHARE,
    "super_offload": BOOL,
    "cpuadam_cores_perc": SHARE,
}
OFFLOAD_PARAM: dict[str, Knob] = {
    "device": Knob(str),
    "nvme_path": Knob(str, optional=True),
    "buffer_count": WHOLE,
    "buffer_size": WHOLE,
    "max_in_cpu": WHOLE,
    "pin_memory": BOOL,
}
OBJECTS: dict[str, dict[str, Knob]] = {
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "offload_param": OFFLOAD_PARAM,
    "leaf_module": {"classes": TEXTS, "names": TEXTS, "name_suffixes": TEXTS},
}
"""Objects inside ``zero_optimization``."""

TOP: dict[str, dict[str, Knob] | Knob] = {
    "zero_optimization": ZERO,
    "aio": {
        "block_size": Knob(int, 1), "queue_depth": Knob(int, 1), "intra_op_parallelism": Knob(int, 1),
        "single_submit": BOOL, "overlap_events": BOOL,
    },
    "comms_logger": {"enabled": BOOL, "prof_all": BOOL, "prof_ops": TEXTS, "verbose": BOOL, "debug": BOOL},
    "wall_clock_breakdown": BOOL,
    "memory_breakdown": BOOL,
}  # fmt: skip
"""Of the file itself."""

REFUSED = {
    "cpu_offload": 'is an old name; give "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'is an old name; give "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": (
        "is an old name; give pin_memory inside offload_optimizer and offload_param"
    ),
    "stage3_gather_fp16_weights_on_model_save": (
        "is an old name; remove it: checkpoints hold whole weights already"
    ),
    "compute_grad_norm": "is not for a file: every step records the gradient's norm; remove it",
    "legacy_stage1": "is not in DeepSpeed any more; remove it",
    "zenflow": "is not supported: it brings an optimizer of its own; remove it",
}
"""What DeepSpeed knows inside ``zero_optimization``, and why a file must not say it."""


def parse_strictly(text: str) -> Any:
    """What JSON says. What passes for JSON with Python is refused: a repeated key, ``NaN`` and ``Infinity``.

    Raises:
        ValueError: it is no JSON; a ``json.JSONDecodeError`` where the place is known.
        RecursionError: it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        at = f" at {shown(text[error.pos :].splitlines()[0][:30])}" if text[error.pos :].strip() else ""
        raise json.JSONDecodeError(error.msg + at, text, error.pos) from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} appears twice in one object; remove one")
        found[key] = value
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number there; give one")


def check_knobs(path: Path, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a file with whole numbers as such, each under one name, and without what says "no
    offload".

    Args:
        path: for messages.
        knobs: what the file holds, without keys that the run decides.

    Raises:
        UserError: an unknown key, a value of another type or out of range, a combination that cannot train.
    """
    checked: dict[str, Any] = {}
    for key, value in knobs.items():
        known = TOP.get(key)
        if known is None:
            raise _unknown(path, "", key, list(TOP), [("zero_optimization", [*ZERO, *OBJECTS, *REFUSED])])
        if isinstance(known, Knob):
            checked[key] = _value(path, key, known, value)
        elif not isinstance(value, dict):
            raise UserError(f"{path}: {key} is {_json(value)} but must be an object")
        elif key != "zero_optimization":
            checked[key] = _object(path, f"{key}.", known, value)
    zero = knobs.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: 'zero_optimization.stage' must be 0, 1, 2 or 3")
    checked["zero_optimization"] = _zero(path, zero)
    return checked


def _zero(path: Path, zero: Mapping[str, Any]) -> dict[str, Any]:
    where = "zero_optimization."
    checked: dict[str, Any] = {}
    for given, value in zero.items():
        key = f"stage3_{given}" if f"stage3_{given}" in ZERO else given
        if key in checked:
            raise UserError(f"{path}: {where}{key} is given twice, once as {given}; remove one")
        if key in REFUSED:
            raise UserError(f"{path}: {where}{key} {REFUSED[key]}")
        if (inside := OBJECTS.get(key)) is not None:
            if value is None:
                continue
            if not isinstance(value, dict):
                example = '"names": []' if key == "leaf_module" else '"device": "cpu"'
                raise UserError(
                    f"{path}: {where}{key} is {_json(value)} but must be an object such as {{{example}}}; "
                    "remove it for none"
                )
            checked[key] = _object(path, f"{where}{key}.", inside, value)
        elif (knob := ZERO.get(key)) is not None:
            checked[key] = _value(path, where + given, knob, value)
        else:
            elsewhere = [(f"{where}{name}", list(keys)) for name, keys in OBJECTS.items()]
            known = [*ZERO, *OBJECTS, *(name.removeprefix("stage3_") for name in ZERO)]
            raise _unknown(path, where, key, known, [*elsewhere, ("the file itself", [*TOP])])
    for key in ("offload_optimizer", "offload_param"):
        if key in checked and not _offloads(path, where + key, checked[key], checked["stage"]):
            del checked[key]
    _check_combinations(path, checked)
    return checked


def _check_combinations(path: Path, zero: Mapping[str, Any]) -> None:
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(key, 0) > MOST_BUCKET:
            raise UserError(
                f"{path}: zero_optimization.{key} is {zero[key]} but must be {MOST_BUCKET:,} or less"
            )
    if zero["stage"] in (1, 2) and zero.get("allgather_bucket_size", 0) % 2:
        raise UserError(
            f"{path}: zero_optimization.allgather_bucket_size is {zero['allgather_bucket_size']} but must be "
            "even at stages 1 and 2"
        )
    if zero.get("stage3_module_granularity_threshold"):
        raise UserError(
            f"{path}: zero_optimization.stage3_module_granularity_threshold is not supported, as each layer "
            "is gathered whole already; remove it"
        )


def check_world(path: Path, zero: Mapping[str, Any], world_size: int, tp_size: int) -> None:
    """Whether checked knobs fit so many processes.

    Args:
        path: for messages.
        zero: ``zero_optimization`` as ``check_knobs`` gives it.
        world_size: processes in all.
        tp_size: tensor-parallel size.

    Raises:
        UserError: they do not.
    """
    size = zero.get("zero_hpz_partition_size", 1)
    if zero["stage"] != 3 or size < 2:
        return
    name = "zero_optimization.zero_hpz_partition_size"
    if tp_size > 1:  # DeepSpeed's groups of neighbours would mix the shards of one tensor-parallel group
        raise UserError(
            f"{path}: {name} needs parallel.tensor_parallel_size=1, which is {tp_size}; remove it"
        )
    if world_size % min(size, world_size):
        raise UserError(
            f"{path}: {name} is {size} but must divide the {world_size} processes; correct or remove it"
        )


def check_device(path: Path, zero: Mapping[str, Any]) -> None:
    """Whether checked knobs can be used without a GPU.

    Raises:
        UserError: DeepSpeed has no such code for a CPU.
    """
    used = [key for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights") if zero.get(key)]
    offload = zero.get("offload_optimizer", {})
    used += ["offload_optimizer.ratio"] * (offload.get("ratio", 1.0) != 1.0)
    used += ["offload_optimizer.super_offload"] * offload.get("super_offload", False)
    if used and zero["stage"] == 3:
        raise UserError(f"{path}: zero_optimization.{used[0]} needs a GPU, and none is visible; remove it")


def _offloads(path: Path, name: str, offload: Mapping[str, Any], stage: int) -> bool:
    """Whether such an object asks for anything: DeepSpeed's device is ``none`` where a file names none."""
    device = offload.get("device", "none")
    if device == "none":
        return False
    if device == "nvme":
        raise UserError(
            f"{path}: {name} to nvme is not supported: checkpoints do not reach what lies there; set its "
            "device to cpu, or use train.deepspeed_config=zero3_offload"
        )
    if device != "cpu":
        raise UserError(f"{path}: {name}.device is {shown(device)} but must be 'cpu' or 'none'")
    lowest = 3 if name.endswith("offload_param") else 1
    if stage < lowest:
        raise UserError(
            f"{path}: {name} needs zero_optimization.stage {lowest}{'' if lowest == 3 else ' or above'}, "
            f"which is {stage}; raise the stage, or remove it"
        )
    for key, off in (("ratio", 1.0), ("super_offload", False)):
        if stage != 3 and offload.get(key, off) != off:
            raise UserError(f"{path}: {name}.{key} needs zero_optimization.stage 3; remove it")
    return True


def _object(path: Path, where: str, known: Mapping[str, Knob], given: Mapping[str, Any]) -> dict[str, Any]:
    checked = {}
    for key, value in given.items():
        if key not in known:
            raise _unknown(path, where, key, list(known), [("zero_optimization", [*ZERO, *OBJECTS])])
        checked[key] = _value(path, where + key, known[key], value)
    return checked


def _value(path: Path, name: str, knob: Knob, given: Any) -> Any:
    if given is None and knob.optional:
        return None
    value = knob.value_of(given)
    if value is None:
        if given == "auto":
            raise UserError(
                f"{path}: {name} is 'auto', which only the Trainer of transformers fills in; give "
                f"{knob.expected}, or remove it for DeepSpeed's default"
            )
        most = " and below 2**63" if type(given) in (int, float) and given > MOST else ""
        raise UserError(
            f"{path}: {name} is {_json(given)} but must be {knob.expected}{most}; correct or remove it"
        )
    return value


def _unknown(
    path: Path, where: str, key: str, known: list[str], elsewhere: list[tuple[str, list[str]]]
) -> UserError:
    message = f"{path}: unknown key {shown(where + key)}"
    if homes := [name for name, keys in elsewhere if key in keys]:
        return UserError(f"{message}; it belongs in {' or '.join(homes)}")
    if near := difflib.get_close_matches(key[:100], known, n=1):
        return UserError(f"{message}; did you mean {near[0]!r}?")
    names = f"known: {', '.join(known)}" if len(known) < 12 else "correct or remove it"
    return UserError(f"{message}; {names}")


def _json(value: Any) -> str:
    """A value for a message, as the file has it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else shown(value)
