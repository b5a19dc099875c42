"""Initial weights: a function of the seed and the parameter's name, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from megatron_lpa.config import ModelConfig
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.rng import named_generator
from megatron_lpa.parallel.sharding import spec_of, split
from megatron_lpa.structures.parameter_spec import ParameterSpec


def initial_value(name: str, spec: ParameterSpec, model: ModelConfig, seed: int) -> torch.Tensor:
    """The unsharded initial value of one parameter, fp32 on the CPU.

    ``init: pytorch`` draws what ``nn.Linear`` (uniform within ``1/sqrt(fan_in)``, weights and biases) and
    ``nn.Embedding`` (standard normal) draw; the matrix of a tied head would make logits of standard
    deviation sqrt(D), so tied embeddings draw N(0, init_std) instead. ``init: normal`` draws
    N(0, init_std) and divides output projections by sqrt(2 num_layers); the factors of a pair draw equal
    deviations such that the entries of ``W_B W_A`` have the deviation of the dense matrix. Rows of padded
    ids are zero, so that padding changes no other value.
    """
    if spec.role == "norm_weight":
        return torch.ones(spec.shape)
    if spec.role == "norm_bias":
        return torch.zeros(spec.shape)
    drawn = spec.shape if spec.real_rows is None else (spec.real_rows, *spec.shape[1:])
    value = torch.empty(drawn)
    generator = named_generator(seed, name)
    if model.init == "pytorch":
        if spec.role == "embedding":
            value.normal_(0.0, model.init_std if model.tie_embeddings else 1.0, generator=generator)
        else:
            bound = 1.0 / math.sqrt(spec.fan_in)
            value.uniform_(-bound, bound, generator=generator)
    elif spec.role == "bias":
        value.zero_()
    else:
        deviation = model.init_std
        if spec.role == "output":
            deviation /= math.sqrt(2 * model.num_layers)
        if spec.rank is not None:
            # An entry of the product sums r terms of variance s^4.
            deviation = math.sqrt(deviation / math.sqrt(spec.rank))
        value.normal_(0.0, deviation, generator=generator)
    if drawn != spec.shape:
        value = torch.cat((value, value.new_zeros((spec.shape[0] - drawn[0], *spec.shape[1:]))))
    return value


def named_parameters_once(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under its first name; a tied matrix comes once."""
    yield from module.named_parameters(remove_duplicate=True)


def initialize(
    module: nn.Module,
    model: ModelConfig,
    groups: ParallelGroups,
    seed: int,
    writable: Callable[[nn.Parameter], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> None:
    """Give every parameter this rank's slice of its initial value.

    Only one unsharded parameter exists at a time.

    Args:
        module: a decoder built from ``model``.
        model: the decoder's config.
        groups: process groups the decoder was built with.
        seed: run seed.
        writable: context in which a parameter holds its whole shard (ZeRO-3 gathers and partitions it).
    """
    for name, parameter in named_parameters_once(module):
        spec = spec_of(parameter)
        value = split(initial_value(name, spec, model, seed), spec, groups.tp_rank, groups.tp_size)
        with writable(parameter), torch.no_grad():
            parameter.copy_(value)
