"""From sample indices to arrays of tokens."""

from __future__ import annotations

import numpy as np

from megatron_lpa.data.samples import Samples
from megatron_lpa.errors import UserError


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
            f"{samples.origin(int(indices[row]))} holds token id {tokens[row, column]}, but the model knows ids "
            f"0 to {vocab_size - 1}; the data was made with another tokenizer: preprocess it again, or set "
            "model.vocab_size to that tokenizer's size"
        )
    return tokens
