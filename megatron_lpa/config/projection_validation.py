"""The checks of ``model.projections.*``: each by itself, in every layer, and under tensor parallelism."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_lpa.config.model import ModelConfig
from megatron_lpa.errors import UserError, shown
from megatron_lpa.structures.projection import PLAIN, ProjectionConfig, check_numbers, layers_meant
from megatron_lpa.structures.structure import Structure, said_of


def check_projections(model: ModelConfig) -> None:
    """Raise UserError for a projection that cannot be built in some layer."""
    for field in dataclasses.fields(model.projections):
        name, projection = field.name, getattr(model.projections, field.name)
        key = f"model.projections.{name}"
        if model.activation != "swiglu" and name == "gate" and projection != ProjectionConfig():
            changed = next(
                f.name for f in dataclasses.fields(projection) if getattr(projection, f.name) != f.default
            )
            raise UserError(
                f"{key}.{changed} is {getattr(projection, changed)} but model.activation {model.activation} "
                f"has no gate; leave {key} as it is by default (kind dense), or set model.activation to "
                "swiglu"
            )
        if name in model.projection_widths():
            every_way = _built(key, projection)
            _check_projection(model, name, *next(every_way))
            _check_layers(f"{key}.by_layer", projection.by_layer or {}, model.num_layers)
            for where, settings in every_way:
                _check_projection(model, name, where, settings)


def _check_projection(model: ModelConfig, name: str, where: str, settings: ProjectionConfig) -> None:
    key = f"model.projections.{name}"
    check_numbers(settings, key, where)
    model.structure(name, settings=settings).check(key, where)


def _check_layers(key: str, by_layer: dict[str, int | str], num_layers: int) -> None:
    """That each entry names layers that there are, once, and what they can be."""
    taken: list[tuple[range, str]] = []
    for layers, built in by_layer.items():
        try:
            meant = layers_meant(layers)
        except ValueError:
            raise UserError(
                f"{key} names layers {shown(layers)}; name one by its number, or several by the first and "
                "the last, as "
                "{0: dense, 1-3: 64}"
            ) from None
        if meant.stop > num_layers:
            raise UserError(
                f"{key} names layers {layers} but model.num_layers is {num_layers}; they are counted from 0 "
                f"to {num_layers - 1}"
            )
        for other, name in taken:
            if meant.start < other.stop and other.start < meant.stop:
                raise UserError(
                    f"{key} names layer {max(meant.start, other.start)} twice, in {name} and in {layers}; "
                    "name each layer once"
                )
        taken.append((meant, layers))
        if isinstance(built, str) and built not in PLAIN:
            raise UserError(
                f"{key} is {shown(built)} for layers {layers}; give {' or '.join(PLAIN)}, or a rank"
            )


def _built(key: str, projection: ProjectionConfig) -> Iterator[tuple[str, ProjectionConfig]]:
    """Each way in which it is built: where that is said, and what it is."""
    yield key, dataclasses.replace(projection, by_layer=None)
    for layers in projection.by_layer or ():
        yield f"{key}.by_layer, layers {layers}", projection.at_layer(layers_meant(layers).start)


def _structures(model: ModelConfig) -> Iterator[tuple[str, str, Structure]]:
    """Each way in which a linear that the model has is built: its key, where that is said, and what it is."""
    for name in model.projection_widths():
        key = f"model.projections.{name}"
        for where, settings in _built(key, getattr(model.projections, name)):
            yield key, where, model.structure(name, settings=settings)


def split_sizes(model: ModelConfig) -> dict[str, int]:
    """What the tensor-parallel size has to divide, by where it is said."""
    split = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }
    for key, where, structure in _structures(model):
        split |= structure.split_sizes(key, where)
    return split


def rank_warnings(model: ModelConfig) -> list[str]:
    """Factors that have as many parameters as the dense matrix."""
    warnings = []
    for key, where, structure in _structures(model):
        rank, whole = structure.settings.rank, structure.d_in * structure.d_out
        if rank is None or (elements := structure.elements(matrices=True)) < whole:
            continue
        warnings.append(
            f"{said_of('rank', key, where)} is {rank}: the factors have as many parameters as the dense "
            f"{structure.d_out} x {structure.d_in} matrix or more; they save from "
            f"{(whole - 1) // (elements // rank)} down"
        )
    return warnings
