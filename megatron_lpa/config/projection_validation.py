"""The checks of ``model.projections.*``: each by itself, in every layer, and under tensor parallelism."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_lpa.config.data_validation import at_least, at_most
from megatron_lpa.config.model import ModelConfig, ProjectionConfig, layers_meant
from megatron_lpa.errors import UserError, shown

MOST_SIZE = 2**31 - 1
"""Of a dimension, and of a batch: kernels count in 32 bits."""


def divisors(number: int, limit: int = 1024) -> str:
    """All of them up to a limit, for a message."""
    return ", ".join(str(n) for n in range(1, min(number, limit) + 1) if number % n == 0)


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
                f"{key}.{changed} is {getattr(projection, changed)} but model.activation {model.activation} has no "
                f"gate; leave {key} as it is by default (kind dense), or set model.activation to swiglu"
            )
        _check_projection(key, dataclasses.replace(projection, by_layer=None))
        if projection.by_layer is not None:
            _check_layers(f"{key}.by_layer", projection.by_layer, model.num_layers)
            for where, own in _built(key, projection):
                _check_projection(key, own, where)


def _check_layers(key: str, by_layer: dict[str, int | str], num_layers: int) -> None:
    """That each entry names layers that there are, once, and what they can be."""
    taken: list[tuple[range, str]] = []
    for layers, built in by_layer.items():
        try:
            meant = layers_meant(layers)
        except ValueError:
            raise UserError(
                f"{key} names layers {shown(layers)}; name one by its number, or several by the first and the last, as "
                "{0: dense, 1-3: 64}"
            ) from None
        if meant.stop > num_layers:
            raise UserError(
                f"{key} names layers {layers} but model.num_layers is {num_layers}; they are counted from 0 to "
                f"{num_layers - 1}"
            )
        for other, name in taken:
            if meant.start < other.stop and other.start < meant.stop:
                raise UserError(
                    f"{key} names layer {max(meant.start, other.start)} twice, in {name} and in {layers}; name each "
                    "layer once"
                )
        taken.append((meant, layers))
        if isinstance(built, str) and built != "dense":
            raise UserError(f"{key} is {shown(built)} for layers {layers}; give dense, or a rank")


def _built(key: str, projection: ProjectionConfig) -> Iterator[tuple[str, ProjectionConfig]]:
    """Each way in which it is built: where that is said, and what it is."""
    yield key, dataclasses.replace(projection, by_layer=None)
    for layers in projection.by_layer or ():
        yield f"{key}.by_layer, layers {layers}", projection.at_layer(layers_meant(layers).start)


def _check_projection(key: str, projection: ProjectionConfig, where: str = "") -> None:
    """Check one way in which a projection is built, where ``by_layer`` says so."""
    rank = f"{where}: rank" if where.startswith(f"{key}.") else f"{key}.rank"
    if projection.kind == "dense":
        if projection.rank is not None:
            raise UserError(
                f"{rank} is {projection.rank} but {key}.kind is dense; set the kind to lowdim, or the "
                "rank to null"
            )
    elif projection.rank is None:
        raise UserError(f"{rank} is empty but {key}.kind is {projection.kind}; set the rank")
    else:
        at_least(rank, projection.rank, 1)
        at_most(rank, projection.rank, MOST_SIZE)
    if projection.bias in ("latent", "both") and projection.kind != "lowdim":
        raise UserError(
            f"{key}.bias is {projection.bias} but {where or key} is {projection.kind}, which has no bias on a latent; "
            "use output, default or none"
        )


def built_projections(model: ModelConfig) -> Iterator[tuple[str, str, ProjectionConfig]]:
    """Each way in which a linear that the model has is built: where that is said, its name, and what it is."""
    for name in model.projection_widths():
        for where, projection in _built(f"model.projections.{name}", getattr(model.projections, name)):
            yield where, name, projection


def split_sizes(model: ModelConfig) -> dict[str, int]:
    """What the tensor-parallel size has to divide, by where it is said."""
    split = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }
    for where, _, projection in built_projections(model):
        if projection.kind == "lowdim":
            assert projection.rank is not None
            split[_rank_of(where)] = projection.rank
    return split


def rank_warnings(model: ModelConfig) -> list[str]:
    """Pairs that have as many parameters as the dense matrix."""
    warnings = []
    widths = model.projection_widths()
    for where, name, projection in built_projections(model):
        d_in, d_out = widths[name]
        if projection.rank is None or projection.elements(d_in, d_out) < d_in * d_out:
            continue
        of_each_rank = projection.elements(d_in, d_out) // projection.rank
        warnings.append(
            f"{_rank_of(where)} is {projection.rank}: the factors have as many parameters as the dense {d_out} x {d_in} "
            f"matrix or more; they save from {(d_in * d_out - 1) // of_each_rank} down"
        )
    return warnings


def _rank_of(where: str) -> str:
    return f"{where}: rank" if "," in where else f"{where}.rank"
