"""Text from a trained decoder, one token at a time.

There is no key/value cache: every new token runs the whole window again, which is quadratic in the length
but short, obviously right, and fast enough to look at a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_lpa.config.values import MOST_WHOLE
from megatron_lpa.data.tokenizers.opening import Tokenizer
from megatron_lpa.errors import UserError, shown
from megatron_lpa.layers.cross_entropy import mask_padded_ids
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.number_checks import FLOAT32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: where to stop at the latest.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: choose among the k most likely tokens; None for all.
        top_p: choose among the fewest most likely tokens whose probabilities, after temperature and
            ``top_k``, sum to ``top_p`` or more (nucleus sampling, arXiv 1904.09751); 1 for all.
        seed: below 2**63. Sample ``i`` is drawn with ``seed + i``, modulo 2**63, however many samples are
            drawn beside it.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; give 0 or more")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}; give 0 (greedy) or more")
        if self.temperature and not FLOAT32[0] <= self.temperature <= FLOAT32[1]:
            raise UserError(
                f"--temperature is {self.temperature}; give 0 (greedy), or {FLOAT32[0]:.2g} to "
                f"{FLOAT32[1]:.2g}: logits are divided in float32"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k is {self.top_k}; give 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; give a share above 0, at most 1")
        if not 0 <= self.seed <= MOST_WHOLE:
            raise UserError(f"--seed is {shown(self.seed)}; give 0 or more, below 2**63")


def generate_ids(
    decoder: Decoder,
    prompt: Sequence[int],
    sampling: Sampling,
    num_samples: int = 1,
    eod_id: int | None = None,
) -> list[list[int]]:
    """Continue a prompt ``num_samples`` times, all samples in one batch.

    The model sees the last ``sequence_length`` ids; the window slides when the text grows beyond. Padded
    vocabulary ids have probability zero.

    Args:
        decoder: in eval mode.
        prompt: ids to continue, at least one.
        sampling: how.
        num_samples: continuations.
        eod_id: a sample ends where this id is drawn; None never ends early.

    Returns:
        the new ids of each sample, without the prompt and without ``eod_id``.
    """
    assert prompt and num_samples >= 1
    device = next(decoder.parameters()).device
    generators = [
        torch.Generator(device).manual_seed((sampling.seed + sample) % (MOST_WHOLE + 1))
        for sample in range(num_samples)
    ]
    text = torch.tensor(
        [list(prompt)] * num_samples, dtype=torch.int64, device=device
    )  # (num_samples, tokens)
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    open_samples = set(range(num_samples))
    with torch.inference_mode():
        for _ in range(sampling.max_new_tokens):
            logits = decoder(text[:, -decoder.config.sequence_length :])[:, -1].float()
            chosen = _choose(mask_padded_ids(logits, decoder.config.vocab_size, 0), sampling, generators)
            text = torch.cat((text, chosen.unsqueeze(-1)), dim=-1)
            for sample, new in enumerate(chosen.tolist()):
                if sample in open_samples and new == eod_id:
                    open_samples.remove(sample)
                elif sample in open_samples:
                    samples[sample].append(new)
            if not open_samples:
                break
    return samples


def generate_text(
    decoder: Decoder, tokenizer: Tokenizer, prompt: str, sampling: Sampling, num_samples: int = 1
) -> list[str]:
    """Prompt and continuation of each sample, as text. An empty prompt starts a document.

    Raises:
        UserError: an empty prompt with a tokenizer that has no end-of-document token.
    """
    ids = tokenizer.encode(prompt)
    start = list(ids)
    if not start:
        if tokenizer.eod_id is None:
            raise UserError(
                f"the prompt is empty and {tokenizer.name} has no end-of-document token to start from; give "
                "a prompt"
            )
        start = [tokenizer.eod_id]
    samples = generate_ids(decoder, start, sampling, num_samples, tokenizer.eod_id)
    return [tokenizer.decode(ids + new) for new in samples]


def _choose(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Logits (B, V) to ids (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # From the largest on, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        # Exactly k, even among equals.
        kept = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        # The first always stays: a share may be 0 in float32.
        beyond[..., 0] = False
        ordered = ordered.masked_fill(beyond, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)
