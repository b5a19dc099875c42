"""How many bytes a run needs on each GPU, from its config alone.

Not counted, and to be left room for: ZeRO's communication buckets and the modules it has gathered at
one time, cuBLAS and NCCL workspaces, fragmentation, the CUDA context.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lpa.config.model import ModelConfig
from megatron_lpa.config.run import ParallelConfig, TrainConfig
from megatron_lpa.model.accounting import count_parameters, projection_parameters


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU; ``bytes_optimizer_state_host`` is on its share of the host instead."""

    bytes_parameters: int
    bytes_gradients: int
    bytes_optimizer_state: int
    bytes_optimizer_state_host: int
    bytes_activations: int

    @property
    def bytes_total(self) -> int:
        """Everything on the GPU."""
        return (
            self.bytes_parameters + self.bytes_gradients + self.bytes_optimizer_state + self.bytes_activations
        )


def element_bytes(train: TrainConfig) -> int:
    """Bytes of one parameter, gradient or activation."""
    return 2 if train.precision == "bf16" else 4


def parameters_per_tensor_rank(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Parameters that one tensor-parallel rank holds before ZeRO shards them.

    Whole on every rank: norms, learned positions, biases of o and down, and, in layout ``latent``, W_B
    of a low-dimensional o or down. Everything else is split.
    """
    size = parallel.tensor_parallel_size
    counts = count_parameters(model)
    positions = model.sequence_length * model.hidden_size if model.position_embedding == "learned" else 0
    whole = counts.norm + positions
    for name in ("o", "down"):
        whole += model.num_layers * projection_parameters(model, name)[1]
        projection = getattr(model.projections, name)
        if projection.kind == "lowdim" and parallel.lowdim_layout == "latent":
            whole += model.num_layers * projection.rank * model.hidden_size
    assert (counts.total - whole) % size == 0, (counts, whole, size)
    return whole + (counts.total - whole) // size


def saved_bytes_per_token_layer(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig
) -> tuple[int, int]:
    """``(bytes, bytes of its input)`` that one layer keeps per token for its backward pass.

    With flash attention, fused norms and dropout (as on a GPU), the two-product path of low-dimensional
    modules, and T the tensor-parallel size, each in the run's precision unless said otherwise:

    - each of the two sublayers: the norm's input D and the projections' input D (before the norm comes
      the residual stream, after it the projections, or the other way round with ``post_sublayer``); the
      norm's statistics, fp32, 2 with layernorm and 1 with rmsnorm; with dropout a mask of D bytes;
    - attention: q (rotated), k (rotated) and v, ``(H + 2K) E / T``; the output ``H E / T``, which is also
      o's input; the log-sum-exp, fp32, ``H / T``;
    - FFN: relu keeps its output ``F/T``, also down's input; gelu its input and output, ``2F/T``; swiglu
      gate, silu(gate), up and their product, ``4F/T``;
    - each low-dimensional module: its latent, r in layout ``latent``, ``r/T`` in ``rank``.
    """
    size, b = parallel.tensor_parallel_size, element_bytes(train)
    d = model.hidden_size
    statistics = 4 * (2 if model.norm == "layernorm" else 1)
    sublayers = 2 * (2 * d * b + statistics + (d if model.dropout > 0 else 0))
    q_width, kv_width = model.num_heads * model.head_width, model.kv_heads * model.head_width
    attention = (2 * q_width + 2 * kv_width) // size * b + 4 * model.num_heads // size
    ffn = {"relu": 1, "gelu": 2, "swiglu": 4}[model.activation] * model.ffn_hidden_size // size * b
    ranks = [getattr(model.projections, name).rank or 0 for name in model.projection_widths()]
    latents = sum(ranks) * b // (size if parallel.lowdim_layout == "rank" else 1)
    return sublayers + attention + ffn + latents, d * b


def bytes_activations(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> int:
    """Peak bytes kept for backward on one GPU, for one micro-batch.

    Every layer's saved tensors; the final norm's and the head's inputs; and, at the loss, the logits of
    ``V/T`` ids in the run's precision, their fp32 softmax and its fp32 gradient. With ``full``
    checkpointing a layer keeps only its input, and the peak is at the loss or where one layer has been
    recomputed, whichever is larger.
    """
    tokens = train.micro_batch_size * model.sequence_length
    b = element_bytes(train)
    saved, layer_input = saved_bytes_per_token_layer(model, parallel, train)
    head = model.hidden_size * b * (2 if model.final_norm else 1)
    loss = model.padded_vocab_size // parallel.tensor_parallel_size * (b + 8)
    if train.activation_checkpointing == "full":
        return tokens * (model.num_layers * layer_input + max(head + loss, saved))
    return tokens * (model.num_layers * saved + head + loss)


def estimate_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    *,
    data_parallel_size: int,
    zero_stage: int,
    offload_optimizer: bool = False,
) -> MemoryEstimate:
    """Bytes per GPU of parameters, gradients, optimizer state and activations.

    Parameters take 2 bytes in bf16, 4 in fp32; gradients 4, as they accumulate in fp32; AdamW's state 12 with bf16 (fp32 master
    weights and two moments), 8 with fp32. ZeRO (arXiv 1910.02054) divides over data-parallel ranks the
    optimizer state from stage 1 on, gradients from 2 on, parameters in 3.

    Args:
        model: the decoder.
        parallel: its tensor-parallel layout.
        train: micro-batch size, precision, activation checkpointing.
        data_parallel_size: ranks that ZeRO shards over.
        zero_stage: 0 to 3.
        offload_optimizer: the optimizer state lives on the host.
    """
    assert 0 <= zero_stage <= 3 and data_parallel_size >= 1, (zero_stage, data_parallel_size)
    count, b = parameters_per_tensor_rank(model, parallel), element_bytes(train)

    def share(size: int, from_stage: int) -> int:
        return -(-size // data_parallel_size) if zero_stage >= from_stage else size

    optimizer_state = share(count * (12 if train.precision == "bf16" else 8), 1)
    return MemoryEstimate(
        bytes_parameters=share(count * b, 3),
        bytes_gradients=share(count * 4, 2),
        bytes_optimizer_state=0 if offload_optimizer else optimizer_state,
        bytes_optimizer_state_host=optimizer_state if offload_optimizer else 0,
        bytes_activations=bytes_activations(model, parallel, train),
    )
