"""The modules that own a sublayer's projections, whatever the structure of each.

All factors of one sublayer's input projections are parameters of one module: ZeRO-3 gathers parameters
per module, and reading x once for several products needs them together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.layers.dense import DenseInput, DenseOutput
from megatron_lpa.layers.lowdim import LowDimInput, LowDimOutput
from megatron_lpa.layers.structure import InputStructure, OutputStructure
from megatron_lpa.ops.products import Norm, Rotary, as_product_input, linears, lowdim_linears
from megatron_lpa.parallel.collectives import copy_to_tp, gather_shards, reduce_scatter_shards
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import new_parameter


def input_structure(name: str, model: ModelConfig, tp_size: int, layout: str) -> InputStructure:
    """The structure that ``model.projections.<name>`` asks for, for a projection of the residual stream.

    ``model`` is that of one layer, as ``ModelConfig.at_layer`` gives it.
    """
    d_in, d_out = model.projection_widths()[name]
    spec = getattr(model.projections, name)
    latent_bias, output_bias = model.biases(name)
    if spec.kind == "dense":
        return DenseInput(d_in, d_out, output_bias)
    return LowDimInput(d_in, d_out, spec.rank, latent_bias, output_bias, tp_size, layout)


def output_structure(
    name: str, model: ModelConfig, tp_size: int, layout: str, path: str = "auto"
) -> OutputStructure:
    """The structure that ``model.projections.<name>`` asks for, for a projection back to the stream; as above."""
    d_in, d_out = model.projection_widths()[name]
    spec = getattr(model.projections, name)
    latent_bias, output_bias = model.biases(name)
    if spec.kind == "dense":
        return DenseOutput(d_in, d_out, output_bias)
    return LowDimOutput(d_in, d_out, spec.rank, latent_bias, output_bias, tp_size, layout, path)


class InputProjections(nn.Module):
    """Several projections of one replicated input; the outputs are split over tensor-parallel ranks.

    Projections of equal collective share one call, whatever their widths. Low-dimensional modules share
    one product, which may read the input once for all of them; dense ones share the gradient of the input.

    Args:
        names: projections in the order in which ``forward`` returns them.
        model: the layer's config.
        groups: process groups.
        layout: tensor-parallel layout of low-dimensional modules.
        kernels: what computes the products.
    """

    def __init__(
        self,
        names: Iterable[str],
        model: ModelConfig,
        groups: ParallelGroups,
        layout: str,
        kernels: KernelConfig,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.path, self.backend = kernels.lowdim, kernels.elementwise
        self.structures = {name: input_structure(name, model, groups.tp_size, layout) for name in names}
        for name, structure in self.structures.items():
            for key, spec in structure.specs().items():
                self.register_parameter(f"{name}_{key}", new_parameter(spec, groups.tp_size))

    @property
    def foldable(self) -> bool:
        """Whether ``forward`` can be given the norm before and the rotation after, to fold them into the products.

        With tensor parallelism it cannot: every rank would have only its part of the norm's gradient, and sums of
        outputs still to be made.
        """
        lowdim = all(isinstance(structure, LowDimInput) for structure in self.structures.values())
        return lowdim and self.groups.tp_size == 1

    def forward(
        self, x: torch.Tensor, norm: Norm | None = None, rotary: Rotary | None = None
    ) -> tuple[torch.Tensor, ...]:
        """(..., d_in) -> one (..., d_out/T) per projection.

        Args:
            x: the input, replicated over ranks.
            norm: an RMSNorm of ``x`` before everything; only where ``foldable``.
            rotary: rotary embedding of the first two outputs; only where ``foldable``.
        """
        assert (norm is None and rotary is None) or self.foldable
        if norm is None:
            x = as_product_input(x)
        x = copy_to_tp(x, self.groups)
        parameters = {name: self._parameters_of(name) for name in self.structures}
        results = self._before(x, parameters, norm, rotary)
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

    def _before(
        self,
        x: torch.Tensor,
        parameters: dict[str, dict[str, torch.Tensor]],
        norm: Norm | None,
        rotary: Rotary | None,
    ) -> dict[str, torch.Tensor]:
        """The products before the collectives, in the order of the projections."""
        at_once = {
            name: structure
            for name, structure in self.structures.items()
            if isinstance(structure, LowDimInput) and structure.multiplies_at_once
        }
        pairs = [structure.pair(parameters[name]) for name, structure in at_once.items()]
        products = lowdim_linears(x, pairs, norm, self.path, self.backend, rotary) if pairs else ()
        found = {name: at_once[name].shaped(z) for name, z in zip(at_once, products, strict=True)}
        dense = [name for name, structure in self.structures.items() if isinstance(structure, DenseInput)]
        if dense:
            matrices = [parameters[name]["weight"] for name in dense]
            biases = [parameters[name].get("bias") for name in dense]
            found |= zip(dense, linears(x, matrices, biases), strict=True)
        return {
            name: found[name] if name in found else s.before(x, parameters[name])
            for name, s in self.structures.items()
        }

    def _parameters_of(self, name: str) -> dict[str, torch.Tensor]:
        return {key: getattr(self, f"{name}_{key}") for key in self.structures[name].specs()}


class OutputProjection(nn.Module):
    """One projection of an input split over tensor-parallel ranks; the output is replicated.

    Args:
        name: ``o`` or ``down``.
        model: the layer's config.
        groups: process groups.
        layout: tensor-parallel layout of low-dimensional modules.
        kernels: what computes the products.
    """

    def __init__(
        self, name: str, model: ModelConfig, groups: ParallelGroups, layout: str, kernels: KernelConfig
    ) -> None:
        super().__init__()
        self.groups = groups
        self.structure = output_structure(name, model, groups.tp_size, layout, kernels.lowdim)
        for key, spec in self.structure.specs().items():
            self.register_parameter(key, new_parameter(spec, groups.tp_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in/T) -> (..., d_out)"""
        parameters = {key: getattr(self, key) for key in self.structure.specs()}
        return self.structure.apply(x, parameters, self.groups)
