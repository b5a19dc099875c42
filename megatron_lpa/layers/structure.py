"""What a structured linear must say about itself. ``docs/adding_a_structure.md`` walks through one.

A *structure* owns no parameters. It names the parameters its module must own and computes with them,
in steps around the collectives, so that several projections of one input share one collective. Two
protocols, because the two ends of a sublayer differ under tensor parallelism:

* ``InputStructure`` (q, k, v, up, gate): the input is replicated, the output split over ranks.
* ``OutputStructure`` (o, down): the input is split over ranks, the output replicated.

Shapes: T is the tensor-parallel size, R the rank of a module; ``d/T`` is an axis split over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch

from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import ParameterSpec

Collective = Literal["none", "gather", "reduce_scatter"]
Parameters = Mapping[str, torch.Tensor]


class InputStructure(Protocol):
    """One projection from the replicated input (..., d_in) to its own part (..., d_out/T)."""

    @property
    def collective(self) -> Collective:
        """What joins ``before`` and ``after``."""

    def specs(self) -> dict[str, ParameterSpec]:
        """The parameters, by short name."""

    def before(self, x: torch.Tensor, p: Parameters) -> torch.Tensor:
        """The products before the collective.

        Returns:
            (..., d_out/T) for ``none``; (..., w), this rank's part, for ``gather``;
            (..., T, w), partial sums for every rank, for ``reduce_scatter``.
        """

    def after(self, y: torch.Tensor, p: Parameters) -> torch.Tensor:
        """The products after the collective; not called for ``none``.

        Args:
            y: (..., T, w) after ``gather``; (..., w) after ``reduce_scatter``.
            p: as in ``before``.

        Returns:
            (..., d_out/T)
        """


class OutputStructure(Protocol):
    """One projection from this rank's part of the input (..., d_in/T) to the output (..., d_out)."""

    def specs(self) -> dict[str, ParameterSpec]:
        """The parameters, by short name."""

    def apply(self, x: torch.Tensor, p: Parameters, groups: ParallelGroups) -> torch.Tensor:
        """All products and collectives; every rank returns the same (..., d_out)."""
