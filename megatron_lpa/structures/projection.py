"""How one linear is configured, and the kinds of structures that there are."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from megatron_lpa.errors import UserError, shown
from megatron_lpa.structures.dense import DenseInput, DenseOutput
from megatron_lpa.structures.low_dimensional import LowDimInput, LowDimOutput
from megatron_lpa.structures.structure import InputStructure, OutputStructure, said_of


class Sides(NamedTuple):
    """The two ends of a sublayer."""

    input: type[InputStructure]
    output: type[OutputStructure]


KINDS = {
    "dense": Sides(DenseInput, DenseOutput),
    "lowdim": Sides(LowDimInput, LowDimOutput),
}
"""Every kind of structure, by the name that ``kind`` gives it."""

PLAIN = tuple(kind for kind, sides in KINDS.items() if not sides.input.numbers)
"""Kinds that ``by_layer`` can name, because they need no number."""

RANKED = next(kind for kind, sides in KINDS.items() if "rank" in sides.input.numbers)
"""The kind that a number in ``by_layer`` means where a projection's own kind has no rank."""

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(KINDS)]


def sides_of(kind: str) -> Sides:
    """The structures of a kind.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"{shown(kind)} is no kind of projection; use one of {', '.join(KINDS)}")
    return KINDS[kind]


@dataclass(frozen=True)
class ProjectionConfig:
    """How one linear is built.

    Args:
        kind: ``dense`` is one matrix ``W: (d_out, d_in)``; ``lowdim`` is the paper's pair
            ``W_A: (r, d_in)``, ``W_B: (d_out, r)`` with no nonlinearity between (paper, Section 3.1).
        rank: ``r`` of a low-dimensional module; must be left empty for ``dense``.
        bias: what gets a bias: ``latent`` (W_A's result, r values; a pair only), ``output`` (d_out values),
            ``both`` or ``none``; ``default`` follows ``model.linear_bias``.
        by_layer: layers in which it is built otherwise, counted from 0, as ``{0: dense, 1-3: 64}``:
            ``dense``, or the rank of a low-dimensional module. Layers that are not named are as ``kind`` and
            ``rank`` say.
    """

    kind: Kind = "dense"
    rank: int | None = None
    bias: Literal["default", "none", "latent", "output", "both"] = "default"
    by_layer: dict[str, int | str] | None = None

    def at_layer(self, layer: int) -> ProjectionConfig:
        """What one layer has; ``by_layer`` is empty then."""
        for layers, built in (self.by_layer or {}).items():
            if layer in layers_meant(layers):
                if isinstance(built, str):
                    return ProjectionConfig(kind=built, bias=self.bias)
                kind = self.kind if "rank" in sides_of(self.kind).input.numbers else RANKED
                return dataclasses.replace(self, kind=kind, rank=built, by_layer=None)
        return dataclasses.replace(self, by_layer=None)


def check_numbers(settings: ProjectionConfig, key: str, where: str) -> None:
    """Raise UserError for a number that is given and belongs to other kinds; arguments as in
    ``Structure.check``."""
    own = sides_of(settings.kind).input.numbers
    for kind, sides in KINDS.items():
        for name in sides.input.numbers:
            value = getattr(settings, name)
            if name not in own and value is not None:
                raise UserError(
                    f"{said_of(name, key, where)} is {value} but {key}.kind is {settings.kind}; set the kind "
                    f"to {kind}, or the {name} to null"
                )


def layers_meant(text: str) -> range:
    """The layers that a key of ``by_layer`` names: ``3``, or ``1-4`` with both ends.

    Raises:
        ValueError: it names none.
    """
    found = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", text)
    layers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not layers:
        raise ValueError(text)
    return layers
