"""Which samples each process reads, and their tokens.

Which they are is a pure function of the number of samples consumed. Nothing here has state: a run that has
consumed ``c`` samples goes on with ``c``, whatever its data-parallel or micro-batch size was before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_lpa.data.samples import Samples
from megatron_lpa.errors import UserError


def micro_batch_indices(
    consumed_samples: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[np.ndarray]:
    """The positions in the sample order that one process reads in the next optimizer step.

    The global batch is always positions ``consumed_samples`` to ``consumed_samples + global_batch_size``.
    Micro step ``j`` takes the next ``micro_batch_size * dp_size`` of them, and each rank its own run of
    ``micro_batch_size``; so micro steps, and ranks within them, in order give the same batch for every
    layout.

    Returns:
        one int64 ``(micro_batch_size,)`` array per micro step.
    """
    assert consumed_samples >= 0 and micro_batch_size >= 1 and 0 <= dp_rank < dp_size
    per_micro_step = micro_batch_size * dp_size
    assert global_batch_size % per_micro_step == 0, (global_batch_size, micro_batch_size, dp_size)
    first = consumed_samples + dp_rank * micro_batch_size
    return [
        np.arange(first + offset, first + offset + micro_batch_size, dtype=np.int64)
        for offset in range(0, global_batch_size, per_micro_step)
    ]


def evaluation_indices(
    num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads positions 0 to ``num_samples`` of the plain order, each exactly once over all processes.

    Every process gets the same number of batches of the same size, so that collectives match; where the
    samples run out, the last one is repeated with weight 0. To evaluate ``n`` global batches at most, give
    ``min(split.num_samples, n * global_batch_size)``.

    Yields:
        positions int64 ``(micro_batch_size,)`` and weights float32 ``(micro_batch_size,)``, 1 where the
        sample counts and 0 where it pads. Sum losses times weights and weights over all processes, then
        divide.
    """
    assert num_samples >= 1 and micro_batch_size >= 1 and 0 <= dp_rank < dp_size
    per_micro_step = micro_batch_size * dp_size
    for start in range(0, num_samples, per_micro_step):
        first = start + dp_rank * micro_batch_size
        positions = np.arange(first, first + micro_batch_size, dtype=np.int64)
        weights = (positions < num_samples).astype(np.float32)
        yield np.minimum(positions, num_samples - 1), weights


def load_batch(samples: Samples, indices: np.ndarray, vocab_size: int) -> np.ndarray:
    """Reads samples into one array.

    Training passes ``samples.shuffled(positions)``, evaluation ``samples.in_order(positions)``.

    Args:
        samples: where they come from.
        indices: int64 ``(b,)``.
        vocab_size: ids the model knows.

    Returns:
        int64 ``(b, S + 1)``: inputs are ``[:, :-1]``, labels ``[:, 1:]``.

    Raises:
        UserError: an id is outside the model's vocabulary.
    """
    tokens = samples.read(indices)
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if wrong.size:
        row, column = (int(value) for value in wrong[0])
        raise UserError(
            f"{samples.origin(int(indices[row]))} holds token id {tokens[row, column]}, but the model knows "
            f"ids 0 to {vocab_size - 1}; the data was made with another tokenizer: preprocess it again, or "
            "set model.vocab_size to that tokenizer's size"
        )
    return tokens
