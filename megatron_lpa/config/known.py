"""Keys and files that are none of a configuration: what was meant instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_lpa.config.presets import preset_names
from megatron_lpa.config.schema import CONFIG_KEYS, CONFIG_SECTIONS, nearest
from megatron_lpa.config.yaml_io import read_yaml
from megatron_lpa.errors import TryAgain, UserError, named, shown
from megatron_lpa.run_folder import CONFIG
from megatron_lpa.run_folder import shown as readable

OPTIONS = ("preset", "config", "print-config", "help")

_MOST_LISTED = 4
_DEEPSPEED = (
    "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "steps_per_print", "fp16", "bf16", "zero_allow_untested_optimizer",
    "wall_clock_breakdown",
    "comms_logger", "flops_profiler",
)  # fmt: skip
"""Keys at the top of DeepSpeed's own files, and of no configuration here."""

_PRESET_PARTS = {"shared", "base", "variants"}
_HUGGING_FACE = ("architectures", "model_type")


def check_option(name: str) -> None:
    """Raise unless ``--name`` takes the value of a key; the message has the nearest options."""
    _check(name, "option", "--", "", [*CONFIG_KEYS, *OPTIONS])


def check_key(name: str, source: str, holds_keys: bool) -> None:
    """Raise unless a file's key is a leaf; the message has the nearest keys and sections.

    Args:
        name: dotted.
        source: the file.
        holds_keys: whether there are keys below it: then a section was meant.
    """
    kinds = (CONFIG_SECTIONS, CONFIG_KEYS) if holds_keys else (CONFIG_KEYS, CONFIG_SECTIONS)
    _check(name, "key", "", f" in {source}", *kinds)


def _check(name: str, what: str, prefix: str, where: str, *kinds: Any) -> None:
    if name in CONFIG_KEYS:
        return
    if name in CONFIG_SECTIONS:
        inside = [prefix + key for key in CONFIG_KEYS if key.startswith(f"{name}.")]
        listed = ", ".join(inside[:_MOST_LISTED]) + (", ..." if len(inside) > _MOST_LISTED else "")
        raise UserError(f"{prefix}{name}{where} is a section, not a value; set one of its keys: {listed}")
    guesses = next((found for known in kinds if (found := nearest(name, _in_order(known)))), [])
    names = [prefix + guess for guess in guesses]
    advice = f"did you mean {', '.join(names)}?" if names else "--help lists every key"
    raise UserError(f"unknown {what} {named(prefix + name)}{where}; {advice}")


def _in_order(known: Any) -> list[str]:
    """Names in an order that stays: that of the configuration, or of the alphabet."""
    return sorted(known) if isinstance(known, frozenset) else list(known)


def read_config_file(path: str) -> dict[str, Any]:
    """The contents of the file that ``--config`` names.

    Raises:
        UserError: as ``read_yaml``; or what is there is of another kind: a preset's name, a run folder, a
            file of DeepSpeed, of presets, or of Hugging Face.
        TryAgain: the disk does not give it.
    """
    try:
        tree = read_yaml(Path(path))
    except TryAgain:
        raise
    except UserError as error:
        raise _of_other_kind(path) or error from error
    if found := [key for key in _DEEPSPEED if key in tree]:
        raise UserError(
            f"--config {readable(path)}: a file of DeepSpeed (it has {shown(found[0])}), not a run's "
            f"configuration; give it with --train.deepspeed_config {readable(path)}"
        )
    if tree and set(tree) <= _PRESET_PARTS:
        raise UserError(
            f"--config {readable(path)}: a file of presets (it has {shown(next(iter(tree)))}), not a run's "
            f"configuration; give a preset by its name: --preset {named(preset_names()[0])}"
        )
    if found := [key for key in _HUGGING_FACE if key in tree]:
        raise UserError(
            f"--config {readable(path)}: a model's configuration of Hugging Face (it has {shown(found[0])}), "
            "not a run's; write its sizes into a file of this project's keys (--help lists them)"
        )
    return tree


def _of_other_kind(path: str) -> UserError | None:
    """What to say of a path that is no file, where it is known what it is."""
    if path in preset_names():
        return UserError(f"--config {path}: no file, but a preset's name; give --preset {path}")
    if not os.path.isdir(path):
        return None
    inside = os.path.join(path, CONFIG)
    advice = f"give {readable(inside)}" if os.path.isfile(inside) else "give a file of YAML"
    return UserError(f"--config {readable(path)}: a folder, not a regular file; {advice}")
