"""How many bytes a run needs on each GPU, from its config alone.

Not counted, and to be left room for: ZeRO's communication buckets and the modules it has gathered at
one time, cuBLAS and NCCL workspaces, fragmentation, the CUDA context.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lpa.config.kernels import LOSS_CHUNK_BYTES, KernelConfig, most_whole_logits_bytes
from megatron_lpa.config.model import ModelConfig
from megatron_lpa.config.precision import PRECISIONS
from megatron_lpa.config.run import ParallelConfig, TrainConfig
from megatron_lpa.planning.parameters import parameters_per_tensor_rank
from megatron_lpa.structures.structure import Structure

DEFAULT = KernelConfig()


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


def _structures(model: ModelConfig, parallel: ParallelConfig) -> list[Structure]:
    """The projections of one layer; ``model`` is that layer's."""
    size, layout = parallel.tensor_parallel_size, parallel.lowdim_layout
    return [model.structure(name, size, layout) for name in model.projection_widths()]


def _cast_in_layer(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> int:
    """Bytes of autocast's copies of one layer's matrices; ``model`` is that layer's."""
    precision = PRECISIONS[train.precision]
    if not precision.mixed:
        return 0
    specs = [spec for structure in _structures(model, parallel) for spec in structure.specs().values()]
    matrices = sum(s.local_elements(parallel.tensor_parallel_size) for s in specs if s.role != "bias")
    return matrices * precision.product_bytes


def bytes_cast_weights(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> tuple[int, int]:
    """``(bytes of all layers, bytes of the head)``: autocast's copies of matrices, for one micro-batch.

    They are kept for the backward pass, whole at every ZeRO stage; where activations are recomputed, one
    layer's at a time. Norms and embeddings are not cast, and of biases nothing is kept.
    """
    precision = PRECISIONS[train.precision]
    layers = sum(count * _cast_in_layer(layer, parallel, train) for layer, count in model.layer_kinds())
    columns = model.padded_vocab_size // parallel.tensor_parallel_size
    return layers, columns * model.hidden_size * precision.product_bytes if precision.mixed else 0


def saved_bytes_per_token_layer(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, kernels: KernelConfig = DEFAULT
) -> tuple[int, int]:
    """``(bytes, bytes of its input)`` that one layer keeps per token for its backward pass, without
    checkpointing.

    ``model`` is that layer's (``ModelConfig.at_layer``).

    With flash attention, fused norms and dropout (as on a GPU), the two-product path of low-dimensional
    modules, and T the tensor-parallel size, each in the precision of products unless said otherwise:

    - each of the two sublayers: the norm's input D, in the precision of weights, and the projections' input D
      (before the norm comes the residual stream, after it the projections, or the other way round with
      ``post_sublayer``); the norm's statistics, fp32, 2 with layernorm and 1 with rmsnorm; with dropout a
      mask of D bytes;
    - attention: q (rotated), k (rotated) and v, ``(H + 2K) E / T``; the output ``H E / T``, which is also
      o's input; the log-sum-exp, fp32, ``H / T``;
    - FFN: relu keeps its output ``F/T``, also down's input; gelu its input and output, ``2F/T``; swiglu
      gate, up and their product, ``3F/T``, and with ``kernels.elementwise=eager`` silu(gate) too;
    - each projection: what its structure keeps between its products.
    """
    size, precision = parallel.tensor_parallel_size, PRECISIONS[train.precision]
    b, stream = precision.product_bytes, precision.weight_bytes
    d = model.hidden_size
    statistics = 4 * (2 if model.norm == "layernorm" else 1)
    sublayers = 2 * (d * (stream + b) + statistics + (d if model.dropout > 0 else 0))
    q_width, kv_width = model.num_heads * model.head_width, model.kv_heads * model.head_width
    attention = (2 * q_width + 2 * kv_width) // size * b + 4 * model.num_heads // size
    gated = 4 if kernels.elementwise == "eager" else 3
    ffn = (
        {"relu": 1, "gelu": 2, "gelu_tanh": 2, "swiglu": gated}[model.activation]
        * model.ffn_hidden_size
        // size
        * b
    )
    inside = sum(structure.kept() for structure in _structures(model, parallel))
    return sublayers + attention + ffn + inside * b, d * stream


def kept_bytes_per_token_layer(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, kernels: KernelConfig = DEFAULT
) -> int:
    """Bytes that one layer keeps per token from its forward to its backward pass; ``model`` is that layer's.

    ``full`` checkpointing keeps its input. ``selective`` keeps its input, attention's output and log-sum-exp,
    and the result of each product as this rank computes it, before the collective. A gathered latent is
    gathered again. Layout ``column_row`` computes outputs of whole width on every rank, so there it keeps
    more than ``none`` does with much tensor parallelism.
    """
    saved, layer_input = saved_bytes_per_token_layer(model, parallel, train, kernels)
    if train.activation_checkpointing != "selective":
        return layer_input if train.activation_checkpointing == "full" else saved
    size, b = parallel.tensor_parallel_size, PRECISIONS[train.precision].product_bytes
    kept = model.num_heads * model.head_width // size * b + 4 * model.num_heads // size
    kept += sum(structure.products() for structure in _structures(model, parallel)) * b
    return layer_input + kept


def bytes_loss(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, kernels: KernelConfig = DEFAULT
) -> int:
    """Bytes at the loss of one micro-batch, beside the head's input.

    ``whole``: the logits of ``V/T`` ids in the precision of products, which their gradient overwrites, and
    the fp32 numbers of one chunk of tokens. ``chunked``: logits, overwritten too, and fp32 numbers of one
    chunk, the gradient of the head's input, and the fp32 sum of the head's gradient.
    """
    tokens = train.micro_batch_size * model.sequence_length
    b = PRECISIONS[train.precision].product_bytes
    columns = model.padded_vocab_size // parallel.tensor_parallel_size
    chunk = min(tokens, max(1, LOSS_CHUNK_BYTES // (columns * 4))) * columns
    if tokens * columns * b > most_whole_logits_bytes(kernels.loss):
        return chunk * (b + 4) + tokens * model.hidden_size * b + columns * model.hidden_size * 4
    return tokens * columns * b + chunk * 4


def bytes_activations(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig, kernels: KernelConfig = DEFAULT
) -> int:
    """Peak bytes kept for backward on one GPU, for one micro-batch.

    What every layer keeps; the final norm's and the head's inputs, what the loss needs, and copies of
    weights. With checkpointing the peak is at the loss or where one layer has been recomputed, whichever is
    larger; for ``selective`` that layer is counted whole although some of it was kept.
    """
    tokens = train.micro_batch_size * model.sequence_length
    precision = PRECISIONS[train.precision]
    layers = model.layer_kinds()
    kept = sum(n * kept_bytes_per_token_layer(layer, parallel, train, kernels) for layer, n in layers)
    head = precision.product_bytes + (precision.weight_bytes if model.final_norm else 0)
    cast_in_layers, cast_in_head = bytes_cast_weights(model, parallel, train)
    peak = tokens * model.hidden_size * head + bytes_loss(model, parallel, train, kernels) + cast_in_head
    if train.activation_checkpointing == "none":
        return tokens * kept + peak + cast_in_layers
    recomputed = max(
        tokens * saved_bytes_per_token_layer(layer, parallel, train, kernels)[0]
        + _cast_in_layer(layer, parallel, train)
        for layer, _ in layers
    )
    return tokens * kept + max(peak, recomputed)


def estimate_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    kernels: KernelConfig = DEFAULT,
    *,
    data_parallel_size: int,
    zero_stage: int,
    offload_optimizer: bool = False,
) -> MemoryEstimate:
    """Bytes per GPU of parameters, gradients, optimizer state and activations.

    Parameters take 2 bytes in bf16, 4 in fp32 and bf16_mixed; gradients 4, as they accumulate in fp32;
    AdamW's state 12 with bf16 (fp32 master weights and two moments), 8 with the others. ZeRO (arXiv
    1910.02054) divides over data-parallel ranks the optimizer state from stage 1 on, gradients from 2 on,
    parameters in 3.

    Args:
        model: the decoder.
        parallel: its tensor-parallel layout.
        train: micro-batch size, precision, activation checkpointing.
        kernels: how loss and gated activations are computed; ``auto`` as on a GPU.
        data_parallel_size: ranks that ZeRO shards over.
        zero_stage: 0 to 3.
        offload_optimizer: the optimizer state lives on the host.
    """
    assert 0 <= zero_stage <= 3 and data_parallel_size >= 1, (zero_stage, data_parallel_size)
    count, b = parameters_per_tensor_rank(model, parallel), PRECISIONS[train.precision].weight_bytes

    def share(size: int, from_stage: int) -> int:
        return -(-size // data_parallel_size) if zero_stage >= from_stage else size

    optimizer_state = share(count * (8 if b == 4 else 12), 1)
    return MemoryEstimate(
        bytes_parameters=share(count * b, 3),
        bytes_gradients=share(count * 4, 2),
        bytes_optimizer_state=0 if offload_optimizer else optimizer_state,
        bytes_optimizer_state_host=optimizer_state if offload_optimizer else 0,
        bytes_activations=bytes_activations(model, parallel, train, kernels),
    )
