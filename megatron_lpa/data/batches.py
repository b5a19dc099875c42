"""From sample indices to arrays of tokens."""

from __future__ import annotations

import numpy as np

from megatron_lpa.data.gpt_dataset import GPTDataset
from megatron_lpa.errors import UserError


def load_batch(dataset: GPTDataset, indices: np.ndarray, vocab_size: int) -> np.ndarray:
    """Reads samples, in the order of the text, into one array.

    Training passes ``dataset.shuffled(positions)``; evaluation passes positions as they are.

    Args:
        dataset: where the samples come from.
        indices: sample indices ``(b,)`` in ``range(dataset.num_samples)``.
        vocab_size: ids the model knows.

    Returns:
        int64 ``(b, S + 1)``: inputs are ``[:, :-1]``, labels ``[:, 1:]``.

    Raises:
        UserError: an id is outside the model's vocabulary.
    """
    tokens = np.stack([dataset.sample(int(index)) for index in indices])
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if wrong.size:
        row, column = (int(value) for value in wrong[0])
        raise UserError(
            f"{dataset.indexed.prefix}: sample {int(indices[row])} of {dataset.name} holds token id "
            f"{tokens[row, column]}, but the model knows ids 0 to {vocab_size - 1}; the data was made with "
            "another tokenizer: preprocess it again, or set model.vocab_size to that tokenizer's size"
        )
    return tokens
