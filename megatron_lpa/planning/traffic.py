"""Elements that tensor parallelism moves, from the config alone. ``D`` is the hidden size, ``T`` the
tensor-parallel size."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lpa.config.model import ModelConfig
from megatron_lpa.config.run import ParallelConfig
from megatron_lpa.planning.parameters import ATTENTION_PROJECTIONS, FFN_PROJECTIONS


@dataclass(frozen=True)
class CollectiveElements:
    """Elements that tensor parallelism moves per token and layer, to be multiplied by ``(T-1)/T``; the mean
    over layers.

    That product is what one rank sends in a ring: an all-reduce of n elements counts 2n, an
    all-gather to n or a reduce-scatter of n elements counts n.
    """

    attention_forward: float
    attention_backward: float
    ffn_forward: float
    ffn_backward: float

    @property
    def forward(self) -> float:
        """Attention and FFN."""
        return self.attention_forward + self.ffn_forward

    @property
    def backward(self) -> float:
        """Attention and FFN."""
        return self.attention_backward + self.ffn_backward


def collective_elements_per_token(model: ModelConfig, parallel: ParallelConfig) -> CollectiveElements:
    """What tensor parallelism moves in a layer, the mean over all layers; the structures say what each of
    them moves.

    In backward each sublayer also all-reduces the gradient of its input, 2D, once for all the
    projections that read it. The embedding and the head, outside the layers, are not counted.
    """

    def sublayer(names: tuple[str, ...]) -> tuple[float, float]:
        forward, backward = 0, 2 * model.hidden_size * model.num_layers
        for layer, count in model.layer_kinds():
            for name in names:
                if name in model.projection_widths():
                    moved = layer.structure(
                        name, parallel.tensor_parallel_size, parallel.lowdim_layout
                    ).moved()
                    forward, backward = forward + count * moved[0], backward + count * moved[1]
        return _mean(forward, model.num_layers), _mean(backward, model.num_layers)

    return CollectiveElements(*sublayer(ATTENTION_PROJECTIONS), *sublayer(FFN_PROJECTIONS))


def _mean(total: int, count: int) -> float:
    return total / count if total % count else total // count
