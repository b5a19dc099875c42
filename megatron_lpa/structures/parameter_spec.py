"""What an unsharded parameter is: its shape, its role, and the dimension that tensor parallelism splits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Role = Literal["embedding", "input", "output", "head", "bias", "norm_weight", "norm_bias"]


@dataclass(frozen=True)
class ParameterSpec:
    """The unsharded parameter behind a shard.

    Args:
        shape: shape of the unsharded parameter.
        role: what it is for; decides initial values and weight decay. ``input`` and ``output`` are
            matrices that read, or write, the residual stream.
        fan_in: input width of the linear that the parameter belongs to.
        tp_dim: dimension split over tensor-parallel ranks; None where every rank holds all of it.
        rank: ``r`` of the low-dimensional module the parameter belongs to; None for dense ones.
        real_rows: rows before vocabulary padding; None where rows are not vocabulary ids.
    """

    shape: tuple[int, ...]
    role: Role
    fan_in: int
    tp_dim: int | None = None
    rank: int | None = None
    real_rows: int | None = None

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of one rank's shard."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            assert shape[self.tp_dim] % tp_size == 0, (self, tp_size)
            shape[self.tp_dim] //= tp_size
        return tuple(shape)

    def local_elements(self, tp_size: int) -> int:
        """Elements of one rank's shard."""
        return math.prod(self.local_shape(tp_size))

    def decays(self, biases: bool = False, norms: bool = False) -> bool:
        """Whether weight decay applies: to matrices, and where a run says so to biases and norms."""
        if self.role in ("norm_weight", "norm_bias"):
            return norms
        return biases or self.role != "bias"
