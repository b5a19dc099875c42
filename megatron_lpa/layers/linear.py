"""The modules that own a sublayer's projections, whatever the structure of each.

All factors of one sublayer's input projections are parameters of one module: ZeRO-3 gathers parameters
per module, and reading x once for several products needs them together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron_lpa.config import ModelConfig
from megatron_lpa.layers.dense import DenseInput, DenseOutput
from megatron_lpa.layers.lowdim import LowDimInput, LowDimOutput
from megatron_lpa.layers.structure import InputStructure, OutputStructure
from megatron_lpa.parallel.collectives import copy_to_tp, gather_shards, reduce_scatter_shards
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import new_parameter


def input_structure(name: str, model: ModelConfig, tp_size: int, layout: str) -> InputStructure:
    """The structure that ``model.projections.<name>`` asks for, for a projection of the residual stream."""
    d_in, d_out = model.projection_widths()[name]
    spec = getattr(model.projections, name)
    if spec.kind == "dense":
        return DenseInput(d_in, d_out, model.linear_bias)
    return LowDimInput(d_in, d_out, spec.rank, model.linear_bias, tp_size, layout)


def output_structure(name: str, model: ModelConfig, tp_size: int, layout: str) -> OutputStructure:
    """The structure that ``model.projections.<name>`` asks for, for a projection back to the stream."""
    d_in, d_out = model.projection_widths()[name]
    spec = getattr(model.projections, name)
    if spec.kind == "dense":
        return DenseOutput(d_in, d_out, model.linear_bias)
    return LowDimOutput(d_in, d_out, spec.rank, model.linear_bias, tp_size, layout)


class InputProjections(nn.Module):
    """Several projections of one replicated input; the outputs are split over tensor-parallel ranks.

    Projections of equal collective share one call, whatever their widths.

    Args:
        names: projections in the order in which ``forward`` returns them.
        model: the decoder's config.
        groups: process groups.
        layout: tensor-parallel layout of low-dimensional modules.
    """

    def __init__(self, names: Iterable[str], model: ModelConfig, groups: ParallelGroups, layout: str) -> None:
        super().__init__()
        self.groups = groups
        self.structures = {name: input_structure(name, model, groups.tp_size, layout) for name in names}
        for name, structure in self.structures.items():
            for key, spec in structure.specs().items():
                self.register_parameter(f"{name}_{key}", new_parameter(spec, groups.tp_size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(..., d_in) -> one (..., d_out/T) per projection."""
        x = copy_to_tp(x, self.groups)
        parameters = {name: self._parameters_of(name) for name in self.structures}
        results = {name: s.before(x, parameters[name]) for name, s in self.structures.items()}
        for collective, call in (("gather", gather_shards), ("reduce_scatter", reduce_scatter_shards)):
            members = [name for name, s in self.structures.items() if s.collective == collective]
            if not members:
                continue
            widths = [results[name].shape[-1] for name in members]
            joined = (
                torch.cat([results[name] for name in members], dim=-1)
                if len(members) > 1
                else results[members[0]]
            )
            received = call(joined, self.groups).split(widths, dim=-1)
            for name, part in zip(members, received, strict=True):
                results[name] = self.structures[name].after(part, parameters[name])
        return tuple(results.values())

    def _parameters_of(self, name: str) -> dict[str, torch.Tensor]:
        return {key: getattr(self, f"{name}_{key}") for key in self.structures[name].specs()}


class OutputProjection(nn.Module):
    """One projection of an input split over tensor-parallel ranks; the output is replicated.

    Args:
        name: ``o`` or ``down``.
        model: the decoder's config.
        groups: process groups.
        layout: tensor-parallel layout of low-dimensional modules.
    """

    def __init__(self, name: str, model: ModelConfig, groups: ParallelGroups, layout: str) -> None:
        super().__init__()
        self.groups = groups
        self.structure = output_structure(name, model, groups.tp_size, layout)
        for key, spec in self.structure.specs().items():
            self.register_parameter(key, new_parameter(spec, groups.tp_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in/T) -> (..., d_out)"""
        parameters = {key: getattr(self, key) for key in self.structure.specs()}
        return self.structure.apply(x, parameters, self.groups)
