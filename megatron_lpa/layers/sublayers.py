"""The two sublayers of a decoder layer, attention and FFN, and the modules that own their projections.

Heads and FFN columns are split over tensor-parallel ranks. What a projection is made of, its structure says
(``megatron_lpa/structures``).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lpa.config import KernelConfig, ModelConfig
from megatron_lpa.errors import UserError
from megatron_lpa.ops.elementwise import rotate, swiglu
from megatron_lpa.ops.products import Norm, Pair, Rotary, as_product_input, linear, linears, lowdim_linears
from megatron_lpa.parallel.collectives import (
    copy_to_tp,
    gather_shards,
    reduce_from_tp,
    reduce_scatter_shards,
)
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import new_parameter
from megatron_lpa.structures.projection import KINDS
from megatron_lpa.structures.structure import InputStructure, OutputStructure

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
HALF = (torch.bfloat16, torch.float16)


class BoundOperations:
    """``structures.structure.Operations`` by our products and collectives."""

    linear = staticmethod(linear)
    linears = staticmethod(linears)

    def __init__(self, kernels: KernelConfig, groups: ParallelGroups) -> None:
        self.path, self.elementwise, self.groups = kernels.lowdim, kernels.elementwise, groups

    def lowdim_linears(
        self,
        x: torch.Tensor,
        pairs: Sequence[Sequence[torch.Tensor | None]],
        norm: Norm | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Several low-dimensional modules of one x, in one call."""
        return lowdim_linears(x, [Pair(*pair) for pair in pairs], norm, self.path, self.elementwise, rotary)  # type: ignore[arg-type]

    def reduce_from_tp(self, x: torch.Tensor) -> torch.Tensor:
        """All-reduce over tensor-parallel ranks."""
        return reduce_from_tp(x, self.groups)

    def reduce_scatter_shards(self, x: torch.Tensor) -> torch.Tensor:
        """(..., T, w) -> (..., w)"""
        return reduce_scatter_shards(x, self.groups)


class InputProjections(nn.Module):
    """Several projections of one replicated input; the outputs are split over tensor-parallel ranks.

    All their parameters are this module's: ZeRO-3 gathers parameters per module, and reading the input once
    for several products needs them together. Projections of one kind share one call, and those of equal
    collective share that, whatever their widths.

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
        self.groups, self.ops = groups, BoundOperations(kernels, groups)
        self.structures: dict[str, InputStructure] = {}
        self.own_names: dict[str, dict[str, str]] = {}
        for name in names:
            structure = model.structure(name, groups.tp_size, layout)
            assert isinstance(structure, InputStructure)
            self.structures[name] = structure
            self.own_names[name] = {key: f"{name}_{key}" for key in structure.specs()}
            for key, spec in structure.specs().items():
                self.register_parameter(f"{name}_{key}", new_parameter(spec, groups.tp_size))
        of_kind = {
            sides.input: [name for name, s in self.structures.items() if isinstance(s, sides.input)]
            for sides in reversed(KINDS.values())
        }
        kinds = [(kind, members) for kind, members in of_kind.items() if members]
        # Gradients of the input are added in the reverse of this order: another would change the bits of a
        # resumed run.
        self.kinds = sorted(kinds, key=lambda kind: self.structures[kind[1][0]].collective == "gather")
        self.exchanges = any(s.collective != "none" for s in self.structures.values())
        # To be given the norm before and the rotation after: one call then computes all.
        self.foldable = len(self.kinds) == 1 and all(s.folds for s in self.structures.values())

    def forward(
        self, x: torch.Tensor, norm: Norm | None = None, rotary: Rotary | None = None
    ) -> tuple[torch.Tensor, ...]:
        """(..., d_in) -> one (..., d_out/T) per projection.

        Args:
            x: the input, replicated over ranks.
            norm: an RMSNorm of ``x`` before everything; only where ``foldable``.
            rotary: rotary embedding of the first two outputs; only where ``foldable``.
        """
        if norm is None:
            x = as_product_input(x)
        parameters = {
            name: {key: getattr(self, own) for key, own in names.items()}
            for name, names in self.own_names.items()
        }
        if norm is not None or rotary is not None:
            assert self.foldable
            kind, names = self.kinds[0]
            members = [(self.structures[name], parameters[name]) for name in names]
            return tuple(kind.before_folded(members, x, self.ops, norm, rotary))
        if self.groups.tp_size > 1:
            x = copy_to_tp(x, self.groups)
        results: dict[str, torch.Tensor] = {}
        for kind, names in self.kinds:
            members = [(self.structures[name], parameters[name]) for name in names]
            results |= zip(names, kind.before(members, x, self.ops), strict=True)
        if self.exchanges:
            self._exchange(results, parameters)
        return tuple(results[name] for name in self.structures)

    def _exchange(
        self, results: dict[str, torch.Tensor], parameters: dict[str, dict[str, torch.Tensor]]
    ) -> None:
        """The collectives, and the products after them, in place of ``results``."""
        for collective, call in (("gather", gather_shards), ("reduce_scatter", reduce_scatter_shards)):
            members = [name for name, s in self.structures.items() if s.collective == collective]
            if not members:
                continue
            sent = [results[name] for name in members]
            joined = torch.cat(sent, dim=-1) if len(sent) > 1 else sent[0]
            received = call(joined, self.groups).split([part.shape[-1] for part in sent], dim=-1)
            for name, part in zip(members, received, strict=True):
                results[name] = self.structures[name].after(part, parameters[name], self.ops)


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
        self.ops = BoundOperations(kernels, groups)
        structure = model.structure(name, groups.tp_size, layout)
        assert isinstance(structure, OutputStructure)
        self.structure, specs = structure, structure.specs()
        self.own_names = tuple(specs)
        for key, spec in specs.items():
            self.register_parameter(key, new_parameter(spec, groups.tp_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in/T) -> (..., d_out)"""
        return self.structure.apply(x, {key: getattr(self, key) for key in self.own_names}, self.ops)


class Attention(nn.Module):
    """Causal self-attention with grouped queries: projections q, k, v, scaled dot products, projection o.

    Args:
        model: the layer's config.
        groups: process groups; H and K are divisible by ``tp_size``.
        layout: tensor-parallel layout of low-dimensional modules.
        kernels: what computes products, rotation and attention.
    """

    def __init__(
        self, model: ModelConfig, groups: ParallelGroups, layout: str, kernels: KernelConfig
    ) -> None:
        super().__init__()
        self.head_dim = model.head_width
        self.kernels = kernels
        self.qkv = InputProjections(("q", "k", "v"), model, groups, layout, kernels)
        self.o = OutputProjection("o", model, groups, layout, kernels)
        self.foldable = self.qkv.foldable

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None, norm: Norm | None = None
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D).

        Args:
            x: the residual stream.
            rope: the tables of ``rope_tables``, or None.
            norm: an RMSNorm of ``x`` before everything; only where ``foldable``.
        """
        folded = None if rope is None or not self.foldable else Rotary(*rope)
        # (B, S, heads/T * E) -> (B, S, heads/T, E)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x, norm, folded))
        if rope is not None and folded is None:
            q, k = rotate(q, k, *rope, self.kernels.elementwise)
        return self.o(causal_attention(q, k, v, self.kernels.attention).flatten(-2))


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or ``down(silu(gate(x)) * up(x))`` for SwiGLU (arXiv 2002.05202)."""

    def __init__(
        self, model: ModelConfig, groups: ParallelGroups, layout: str, kernels: KernelConfig
    ) -> None:
        super().__init__()
        self.activation, self.backend = model.activation, kernels.elementwise
        names = ("gate", "up") if model.activation == "swiglu" else ("up",)
        self.inputs = InputProjections(names, model, groups, layout, kernels)
        self.down = OutputProjection("down", model, groups, layout, kernels)
        self.foldable = self.inputs.foldable

    def forward(self, x: torch.Tensor, norm: Norm | None = None) -> torch.Tensor:
        """(B, S, D) -> (B, S, D); ``norm`` is an RMSNorm of ``x`` before everything, where ``foldable``."""
        if self.activation == "swiglu":
            gate, up = self.inputs(x, norm)
            return self.down(swiglu(gate, up, self.backend))
        (up,) = self.inputs(x, norm)
        if self.activation == "relu":
            return self.down(functional.relu(up))
        return self.down(
            functional.gelu(up, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        )


def rope_tables(
    length: int, head_dim: int, base: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding (RoFormer, eq. 34; half rotation), fp32.

    Returns:
        Two tensors (length, head_dim), positions 0 to length - 1.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), base**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, path: str) -> torch.Tensor:
    """``softmax(q k^T / sqrt(E)) v`` over the positions up to each query's own, by the implementation asked
    for.

    On a GPU in half precision PyTorch is kept from its plain implementation, which would write an S x S
    matrix per head and never says so. In fp32 and on a CPU it may choose as it likes.

    Args:
        q: (B, S, H, E).
        k: (B, S, K, E); each of the K heads serves H / K neighbouring heads of q.
        v: (B, S, K, E).
        path: that of ``KernelConfig.attention``; ``auto`` is ``sdpa``.

    Returns:
        (B, S, H, E). Heads lie next to each other, as the projections write and read them: no path copies.

    Raises:
        UserError: ``flash_attn`` where it cannot run, or no fused implementation for half precision on this
            GPU.
    """
    assert path in ("auto", "sdpa", "flash_attn"), path
    if path == "flash_attn":
        _check_flash_attn(q.device.type, q.dtype)
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=True)
    if q.is_cuda and q.dtype in HALF:
        try:
            with sdpa_kernel(FUSED):
                return _sdpa(q, k, v)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise UserError(
                f"no fused attention of PyTorch {torch.__version__} runs on this GPU for {q.dtype} with "
                f"heads of width {q.shape[-1]} ({q.shape[2]} query heads, {k.shape[2]} key heads); choose "
                "another model.head_dim (a multiple of 8, at most 256), or train.precision=fp32"
            ) from error
    return _sdpa(q, k, v)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(1, 2)


@functools.cache
def _check_flash_attn(device_type: str, dtype: torch.dtype) -> None:
    way_out = "set kernels.attention=auto"
    if device_type != "cuda":
        raise UserError(
            f"kernels.attention=flash_attn needs a GPU, but the model is on {device_type}; {way_out}"
        )
    if dtype not in HALF:
        raise UserError(f"kernels.attention=flash_attn needs half precision, not {dtype}; {way_out}")
    if importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            f"kernels.attention=flash_attn needs the package flash-attn; install it, or {way_out}"
        )
