"""What a kind of linear must say about itself. ``docs/adding_a_structure.md`` walks through one.

A *structure* is one projection of one layer, as its kind builds it. It owns no parameters and needs no torch.
It names the parameters, says what they cost, and computes with tensors by the ``Operations`` that it is
handed. There are two base classes, because the two ends of a sublayer differ under tensor parallelism:

* ``InputStructure`` (q, k, v, up, gate): the input is replicated, the output split over ranks.
* ``OutputStructure`` (o, down): the input is split over ranks, the output replicated.

Shapes: T is the tensor-parallel size, R the rank of a module; ``d/T`` is an axis split over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from megatron_lpa.errors import UserError
from megatron_lpa.number_checks import MOST_SIZE, at_least, at_most
from megatron_lpa.structures.parameter_spec import ParameterSpec

if TYPE_CHECKING:
    import torch

    from megatron_lpa.structures.projection import ProjectionConfig

Collective = Literal["none", "gather", "reduce_scatter"]
Parameters = Mapping[str, "torch.Tensor"]


class Operations(Protocol):
    """What structures compute with, bound to a run's kernels and process groups (``layers/sublayers.py``)."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, /) -> torch.Tensor:
        """``x weight^T + bias``, (..., d_in) -> (..., d_out)."""

    def linears(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        /,
    ) -> tuple[torch.Tensor, ...]:
        """``linear`` with several matrices; the gradient of x is summed inside the products."""

    def lowdim_linears(
        self,
        x: torch.Tensor,
        pairs: Sequence[Sequence[torch.Tensor | None]],
        norm: Any = None,
        rotary: Any = None,
    ) -> tuple[torch.Tensor, ...]:
        """Both products of several pairs ``(W_A, W_B, bias_a, bias_b)``, by the path that the kernels ask
        for."""

    def reduce_from_tp(self, x: torch.Tensor) -> torch.Tensor:
        """All-reduce; the gradient passes through."""

    def reduce_scatter_shards(self, x: torch.Tensor) -> torch.Tensor:
        """Partial sums (..., T, w) -> the own part of the sum (..., w); the gradient is gathered."""


@dataclass(frozen=True)
class Structure(ABC):
    """One projection of one layer.

    Args:
        settings: what ``model.projections.<name>`` says for the layer.
        d_in: input width.
        d_out: output width.
        linear_bias: whether there is a bias where ``settings`` does not say.
        tp_size: tensor-parallel size T.
        layout: tensor-parallel layout of low-dimensional modules.
    """

    settings: ProjectionConfig
    d_in: int
    d_out: int
    linear_bias: bool
    tp_size: int
    layout: str

    numbers: ClassVar[tuple[str, ...]] = ()
    """The settings that this kind needs; the other kinds' have to be empty."""

    has_latent_bias: ClassVar[bool] = False
    """Whether a bias may stand on a latent."""

    @property
    def r(self) -> int:
        """The rank, of a kind that needs one."""
        assert self.settings.rank is not None
        return self.settings.rank

    @property
    def biases(self) -> tuple[bool, bool]:
        """Whether there is a bias on the latent, and on the output."""
        asked = self.settings.bias
        return (
            self.default_biases()
            if asked == "default"
            else (asked in ("latent", "both"), asked in ("output", "both"))
        )

    def default_biases(self) -> tuple[bool, bool]:
        """``biases`` where the settings do not say."""
        return False, self.linear_bias

    def check(self, key: str, where: str) -> None:
        """Raise UserError for settings that this kind cannot be built with.

        Args:
            key: of the projection, as ``model.projections.q``.
            where: the same, or the part of its ``by_layer`` that asks for this.
        """
        for name in self.numbers:
            said, value = said_of(name, key, where), getattr(self.settings, name)
            if value is None:
                raise UserError(f"{said} is empty but {key}.kind is {self.settings.kind}; set the {name}")
            at_least(said, value, 1)
            at_most(said, value, MOST_SIZE)
        if self.settings.bias in ("latent", "both") and not self.has_latent_bias:
            raise UserError(
                f"{key}.bias is {self.settings.bias} but {where} is {self.settings.kind}, which has no bias "
                "on a latent; use output, default or none"
            )

    def split_sizes(self, key: str, where: str) -> dict[str, int]:
        """What T has to divide besides heads and FFN columns, by where it is said; arguments as in
        ``check``."""
        return {}

    @abstractmethod
    def specs(self) -> dict[str, ParameterSpec]:
        """The parameters, by short name. Their costs follow: every element of a matrix is one multiply-add
        per token."""

    def elements(self, *, matrices: bool) -> int:
        """Elements of the unsharded matrices, or of the biases."""
        return sum(s.local_elements(1) for s in self.specs().values() if (s.role != "bias") == matrices)

    @abstractmethod
    def moved(self) -> tuple[int, int]:
        """Elements that tensor parallelism moves per token, ``(forward, backward)``, before the factor
        (T-1)/T.

        An all-reduce of n elements counts 2n; an all-gather to n, or a reduce-scatter of n, counts n. The
        all-reduce of the input's gradient is the sublayer's and is not counted here.
        """

    @abstractmethod
    def kept(self) -> int:
        """Elements per token that one rank keeps for the backward pass, besides the input and the output."""

    @abstractmethod
    def products(self) -> int:
        """Elements per token of all products' results on one rank: what selective checkpointing keeps."""


def said_of(name: str, key: str, where: str) -> str:
    """Where a setting is said: ``by_layer`` says ranks, the projection's key everything else."""
    return f"{where}: rank" if name == "rank" and where != key else f"{key}.{name}"


class InputStructure(Structure):
    """One projection from the replicated input (..., d_in) to its own part (..., d_out/T)."""

    @property
    @abstractmethod
    def collective(self) -> Collective:
        """What joins ``before`` and ``after``."""

    @property
    def folds(self) -> bool:
        """Whether ``before_folded`` can be called: with the norm before the products, and the rotation
        after."""
        return False

    @staticmethod
    @abstractmethod
    def before(
        members: Sequence[tuple[Any, Parameters]], x: torch.Tensor, ops: Operations
    ) -> Sequence[torch.Tensor]:
        """The products before the collective, of all projections of this kind that read one x.

        Args:
            members: each projection's structure and parameters.
            x: (..., d_in).
            ops: what to compute with.

        Returns:
            Of each (..., d_out/T) for ``none``; (..., w), this rank's part, for ``gather``;
            (..., T, w), partial sums for every rank, for ``reduce_scatter``.
        """

    @staticmethod
    def before_folded(
        members: Sequence[tuple[Any, Parameters]], x: torch.Tensor, ops: Operations, norm: Any, rotary: Any
    ) -> Sequence[torch.Tensor]:
        """``before`` of the normed x, with the first two outputs rotated; only where ``folds``."""
        raise NotImplementedError

    def after(self, y: torch.Tensor, p: Parameters, ops: Operations) -> torch.Tensor:
        """The products after the collective; not called for ``none``.

        Args:
            y: (..., T, w) after ``gather``; (..., w) after ``reduce_scatter``.
            p: the parameters.
            ops: what to compute with.

        Returns:
            (..., d_out/T)
        """
        raise NotImplementedError


class OutputStructure(Structure):
    """One projection from this rank's part of the input (..., d_in/T) to the output (..., d_out)."""

    @abstractmethod
    def apply(self, x: torch.Tensor, p: Parameters, ops: Operations) -> torch.Tensor:
        """All products and collectives; every rank returns the same (..., d_out)."""
