"""What the manifest of a checkpoint may say: every key that anything reads, its type, and how large it can
be.

A manifest may come from a stranger, with a checksum that fits whatever it says. What is checked here needs no
further check where it is used. Keys that are not listed are left alone: a later version may write more.
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_lpa.checkpoint.progress import decisions_from_json, unrecorded_from_json
from megatron_lpa.config import ModelConfig
from megatron_lpa.config.precision import PRECISIONS
from megatron_lpa.config.run import EARLIER_LAYOUTS

FOLDERS = ("state", "weights")
"""The folders of a checkpoint; every file but the manifest lies in one of them."""

MOST_COUNT = 1 << 53
"""Of samples of an epoch, a step or a micro-batch: what a double can count."""

MOST_PROGRESS = 1 << 60
"""Of steps, samples and tokens up to now. Far above ``MOST_COUNT``, so that what any run can have reached is
below it by more than a run's length, and its next checkpoint is accepted too. Sums of a few fit 64 bits."""

MOST_BYTES = 1 << 50
"""Of one file."""

MOST_PROCESSES = 1 << 17
"""Of one run."""

MOST_ELEMENTS = 1 << 40
"""Of one parameter, and of one dimension."""

MOST_DIMENSIONS = 16
"""Of one parameter."""

Check = Callable[[Any, str, bool], None]
"""Raises ValueError for a value, with the dotted key that it is given; the flag says whether keys may be
missing."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def check_manifest(manifest: Any, complete: bool) -> None:
    """Whether a manifest is one that can be used.

    Args:
        manifest: what the file holds.
        complete: whether the state is needed. The weights alone can be used without many a key, and earlier
            versions wrote less.

    Raises:
        ValueError: it is not; a short message names the key.
    """
    _MANIFEST(manifest, "", complete)
    layout = manifest.get("layout", {})
    processes = layout.get("tensor_parallel_size", 1) * layout.get("data_parallel_size", 1)
    if processes > MOST_PROCESSES:
        raise ValueError(f"layout is one of {processes} processes")
    if not complete:
        return
    tp_size = layout["tensor_parallel_size"]
    for name, parameter in manifest["state"]["parameters"].items():
        shape, tp_dim = parameter["shape"], parameter["tp_dim"]
        if tp_dim is not None and (tp_dim >= len(shape) or shape[tp_dim] % tp_size):
            raise ValueError(
                f"state.parameters: {_short.repr(name)} of shape {shape} is not split over dimension "
                f"{tp_dim} by {tp_size}"
            )


def _refuse(key: str, value: Any, wanted: str) -> None:
    raise ValueError(f"{key or 'it'} is {_short.repr(value)}, not {wanted}")


def _whole(least: int, most: int) -> Check:
    def check(value: Any, key: str, complete: bool) -> None:
        if type(value) is not int or not least <= value <= most:
            _refuse(key, value, f"a whole number from {least} to {most}")

    return check


def _number(value: Any, key: str, complete: bool) -> None:
    # Not a number compares as false.
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        _refuse(key, value, "a finite number")


def _truth(value: Any, key: str, complete: bool) -> None:
    if type(value) is not bool:
        _refuse(key, value, "true or false")


def _text(value: Any, key: str, complete: bool) -> None:
    if type(value) is not str or not 0 < len(value) <= 200 or not value.isprintable():
        _refuse(key, value, "a short text")


def _rank_or_text(value: Any, key: str, complete: bool) -> None:
    if type(value) is str:
        _text(value, key, complete)
    else:
        _whole(1, MOST_ELEMENTS)(value, key, complete)


def _hash(value: Any, key: str, complete: bool) -> None:
    if type(value) is not str or not re.fullmatch("[0-9a-f]{64}", value):
        _refuse(key, value, "a SHA-256 in hex")


def _anything(value: Any, key: str, complete: bool) -> None:
    """What is compared and shown at most."""


def _one_of(*choices: str) -> Check:
    def check(value: Any, key: str, complete: bool) -> None:
        if type(value) is not str or value not in choices:
            _refuse(key, value, f"one of {', '.join(choices)}")

    return check


def _or_none(check: Check) -> Check:
    def check_it(value: Any, key: str, complete: bool) -> None:
        if value is not None:
            check(value, key, complete)

    return check_it


def _table(check: Check, check_name: Callable[[str, str], None] | None = None) -> Check:
    """A JSON object whose values are all of one kind."""

    def check_it(value: Any, key: str, complete: bool) -> None:
        if type(value) is not dict:
            _refuse(key, value, "a JSON object")
        for name, member in value.items():
            if check_name is not None:
                check_name(name, key)
            check(member, f"{key}.{_short.repr(name)[1:-1]}", complete)

    return check_it


def _section(fields: Mapping[str, Check], always: tuple[str, ...] = (), newer: tuple[str, ...] = ()) -> Check:
    """A JSON object with these keys, and perhaps more.

    Args:
        fields: what they hold.
        always: keys that have to be there whatever the manifest is used for.
        newer: keys that earlier versions, whose checkpoints can be continued from, did not write.
    """

    def check_it(value: Any, key: str, complete: bool) -> None:
        if type(value) is not dict:
            _refuse(key, value, "a JSON object")
        for name, check in fields.items():
            dotted = f"{key}.{name}" if key else name
            if name in value:
                check(value[name], dotted, complete)
            elif name in always or (complete and name not in newer):
                raise ValueError(f"{dotted} is missing")

    return check_it


def _typed(hint: Any) -> Check:
    """The check of a setting, from its type in the configuration's dataclass."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        members = {name: _typed(member) for name, member in get_type_hints(hint).items()}
        # One that is missing is a difference, of which users are told.
        return _section(members, newer=tuple(members))
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (member for member in get_args(hint) if member is not type(None))
        return _or_none(_typed(inner))
    if get_origin(hint) is Literal:
        return _text
    if hint == dict[str, int | str]:
        return _table(_rank_or_text)
    checks: dict[Any, Check] = {
        int: _whole(-MOST_ELEMENTS, MOST_ELEMENTS),
        float: _number,
        bool: _truth,
        str: _text,
    }
    return checks[hint]


def _shape(value: Any, key: str, complete: bool) -> None:
    dimension = _whole(1, MOST_ELEMENTS)
    if type(value) is not list or len(value) > MOST_DIMENSIONS:
        _refuse(key, value, f"a list of at most {MOST_DIMENSIONS} dimensions")
    for size in value:
        dimension(size, key, complete)
    if math.prod(value) > MOST_ELEMENTS:
        _refuse(key, value, f"a shape of at most {MOST_ELEMENTS} elements")


def _file_name(name: str, key: str) -> None:
    if not re.fullmatch(rf"({'|'.join(FOLDERS)})/[A-Za-z0-9_][A-Za-z0-9_.-]{{0,200}}", name):
        raise ValueError(f"{key}: {_short.repr(name)} is outside of the checkpoint's {' and '.join(FOLDERS)}")


def _parameter_name(name: str, key: str) -> None:
    _text(name, f"a name in {key}", True)


def _decisions(value: Any, key: str, complete: bool) -> None:
    decisions_from_json(value)


def _unrecorded(value: Any, key: str, complete: bool) -> None:
    unrecorded_from_json(value)


_COUNT = _whole(0, MOST_COUNT)
_PROGRESS = _whole(0, MOST_PROGRESS)
_MANIFEST = _section(
    {
        "versions": _section({"deepspeed": _text}),
        "progress": _section(
            {
                "step": _PROGRESS,
                "consumed_samples": _PROGRESS,
                "consumed_tokens": _PROGRESS,
                "skipped_samples": _PROGRESS,
            },
            always=("step",),
            newer=("skipped_samples",),
        ),
        "validation_loss": _or_none(_number),
        "decisions": _decisions,
        "unrecorded": _unrecorded,
        "evaluates": _section({"valid": _truth, "test": _truth}),
        "at_interval": _truth,
        "layout": _section(
            {
                "tensor_parallel_size": _whole(1, MOST_PROCESSES),
                "data_parallel_size": _whole(1, MOST_PROCESSES),
                "lowdim_layout": _one_of("column_row", "latent", *EARLIER_LAYOUTS),
                "zero_stage": _whole(0, 3),
                "precision": _one_of(*PRECISIONS),
                "micro_batch_size": _whole(1, MOST_COUNT),
            },
        ),
        "order": _section(
            {
                "seed": _whole(-(1 << 63), (1 << 64) - 1),
                "samples_per_epoch": _COUNT,
                "samples_per_step": _COUNT,
                "data": _table(_anything),
            },
        ),
        "model": _typed(ModelConfig),
        "config": _section({"train": _section({"precision": _one_of(*PRECISIONS)})}),
        "state": _section(
            {
                "optimizer_step": _PROGRESS,
                "skipped_steps": _PROGRESS,
                "parameters": _table(
                    _section({"shape": _shape, "tp_dim": _or_none(_whole(0, MOST_DIMENSIONS))}),
                    _parameter_name,
                ),
            },
        ),
        "files": _table(
            _section(
                {"bytes": _whole(0, MOST_BYTES), "sha256": _hash},
                always=("bytes", "sha256"),
            ),
            _file_name,
        ),
    },
    always=("progress", "files"),
    newer=("validation_loss", "decisions", "unrecorded", "evaluates", "at_interval"),
)
