"""What is measured: a preset with changes, on one device, by one kind of training loop.

Configurations are built here from the presets' files without the command-line parser, which a machine that is
lent for an hour may lack. A test holds them equal to what ``load_config`` makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from megatron_lpa.config import ModelConfig, ProjectionsConfig, RunConfig
from megatron_lpa.config.presets import preset_trees
from megatron_lpa.config.schema import CONFIG_KEYS, ConfigKey, nearest
from megatron_lpa.errors import UserError

LOOPS = ("bare", "engine", "llama")
"""``bare``: PyTorch alone. ``engine``: what training runs. ``llama``: ``transformers``, compiled."""

PEERS = ("llama_plain", "official")
"""Others' models in the bare loop, measured on request: ``transformers`` as it is, and the paper's public
code."""

LLAMA_WIDTH_MULTIPLE = 128
"""Widths of its FFN are rounded to this, as matrix products on a GPU like it."""


@dataclass(frozen=True)
class Contender:
    """One model in one loop.

    Args:
        preset: ``family/variant``.
        loop: one of ``LOOPS`` or ``PEERS``.
        micro_batch: sequences per forward pass.
        accumulate: micro-batches per optimizer step.
        precision: ``bf16`` with fp32 master weights, or ``fp32``.
        settings: ``key=value`` on top of the preset.
        layers: decoder layers instead of the preset's.
        sequence: tokens per sequence instead of the preset's.
        dry: small stand-ins for what takes minutes, compiling above all.
    """

    preset: str
    loop: str
    micro_batch: int
    accumulate: int = 1
    precision: str = "bf16"
    settings: tuple[str, ...] = ()
    layers: int | None = None
    sequence: int | None = None
    dry: bool = False

    @property
    def name(self) -> str:
        return f"{self.preset} {self.loop}"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.micro_batch * self.accumulate * self.config().model.sequence_length

    def config(self) -> RunConfig:
        """The run; for both loops of Llama its model is the equivalent that ``transformers`` can build.

        Raises:
            UserError: an unknown preset or key, or a value that does not fit.
        """
        changes = {
            "train.micro_batch_size": self.micro_batch,
            "train.global_batch_size": self.micro_batch * self.accumulate,
            "train.precision": self.precision,
            "train.deepspeed_config": "zero3",
        }
        if self.layers is not None:
            changes["model.num_layers"] = self.layers
        if self.sequence is not None:
            changes["model.sequence_length"] = self.sequence
        config = run_config(self.preset, changes, self.settings)
        if self.loop.startswith("llama"):
            return dataclasses.replace(config, model=llama_equivalent(config.model))
        return config


def run_config(preset: str, changes: Mapping[str, Any], settings: Sequence[str] = ()) -> RunConfig:
    """A preset with changes by dotted key, then ``key=value`` settings on top.

    Raises:
        UserError: an unknown preset or key, or a value that does not fit.
    """
    values: dict[str, Any] = {}
    for _, tree in preset_trees(preset):
        values |= _flat(tree)
    values |= changes
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as key=value, for example kernels.lowdim=joined")
        values[key] = value
    return _built(RunConfig, {key: _typed(key, value) for key, value in values.items()}, "")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, dict) and prefix + name not in CONFIG_KEYS
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _typed(key: str, value: Any) -> Any:
    if key not in CONFIG_KEYS:
        near = ", ".join(nearest(key, CONFIG_KEYS))
        raise UserError(f"--set: unknown key {key!r}" + (f"; did you mean {near}?" if near else ""))
    known = CONFIG_KEYS[key]
    if value is None or (value == "null" and known.optional):
        return None
    try:
        typed = _converted(known, value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}={value}: expected {known.expected}") from error
    if known.choices and typed not in known.choices:
        raise UserError(f"{key}={value}: expected {known.expected}")
    return typed


def _converted(known: ConfigKey, value: Any) -> Any:
    if known.base_type is bool and isinstance(value, str):
        if value not in ("true", "false"):
            raise ValueError(value)
        return value == "true"
    if known.base_type is int:
        number = float(value)
        if number != int(number):
            raise ValueError(value)
        return int(number)
    return known.base_type(value)


def _built(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    arguments = {}
    for name, annotation in get_type_hints(cls).items():
        key = prefix + name
        if dataclasses.is_dataclass(annotation):
            arguments[name] = _built(annotation, values, f"{key}.")
        elif key in values:
            arguments[name] = values[key]
    return cls(**arguments)


def llama_equivalent(model: ModelConfig) -> ModelConfig:
    """The dense model of these widths in Llama's form: RMSNorm, SwiGLU, rotary positions, no biases.

    An FFN of two matrices becomes one of three with as many elements, up to rounding of its width: FLOPs are
    then nearly equal, and the accounting of this form gives the exact ones.

    Raises:
        UserError: the model has low-dimensional projections.
    """
    layers = [layer for layer, _ in model.layer_kinds()]
    if any(
        getattr(at.projections, name).kind != "dense" for at in layers for name in model.projection_widths()
    ):
        raise UserError("Llama's loops run dense models only; leave low-dimensional ones to the other loops")
    width = model.ffn_hidden_size
    if model.activation != "swiglu":
        thirds = 2 * width / 3
        width = max(1, round(thirds / LLAMA_WIDTH_MULTIPLE)) * LLAMA_WIDTH_MULTIPLE
    return dataclasses.replace(
        model,
        ffn_hidden_size=width,
        activation="swiglu",
        norm="rmsnorm",
        norm_position="pre",
        final_norm=True,
        position_embedding="rope",
        linear_bias=False,
        lm_head_bias=False,
        dropout=0.0,
        projections=ProjectionsConfig(),
    )
