"""What every tokenizer offers, and what the kinds of tokenizers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_lpa import files
from megatron_lpa.errors import UserError, shown
from megatron_lpa.files import unreadable

MOST_BYTES = 1 << 30
"""Of a tokenizer's file; those of the largest vocabularies have 35 MB."""

# Names under which tokenizers keep their end-of-document token, the most explicit first.
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<eod>", "<EOD>")


class Tokenizer(Protocol):
    """Text to ids and back.

    Encoding adds no special tokens of its own. ``vocab_size`` is one more than the largest id. ``eod_id``
    ends a document and is ``None`` where the tokenizer has no such token. ``fingerprint`` is a SHA-256 in
    hex of what decides the ids: the model file, for tiktoken ranks also pattern and special tokens.
    ``engine`` says what computes ids: ``"tokenizers"``, ``"sentencepiece"``, ``"tiktoken"`` or
    ``"gigatoken"``. ``fallback_reason`` says why it is not gigatoken where gigatoken was asked for.

    A special token spelt out in a text: with a ``tokenizer.json`` it becomes that token, as everywhere with
    such files; with SentencePiece models and tiktoken ranks it is ordinary text. User-defined symbols of a
    SentencePiece model are always found, that is what they are for.
    """

    name: str
    vocab_size: int
    eod_id: int | None
    fingerprint: str
    engine: str
    fallback_reason: str | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def encode_batch_arrays(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids one after the other, ``(tokens,)`` uint32, and tokens per text, ``(len(texts),)`` int64."""
        ...

    def decode(self, ids: list[int]) -> str: ...


def to_arrays(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as ``encode_batch_arrays`` returns them: uint32 ``(tokens,)``, int64 ``(len(lists),)``."""
    sizes = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    ids = np.empty(int(sizes.sum()), dtype=np.uint32)
    start = 0
    for part in lists:
        ids[start : start + len(part)] = part
        start += len(part)
    return ids, sizes


def shortened(text: str, characters: int = 60) -> str:
    """The text for a message: its repr, of a long one only the start, and its length."""
    if len(text) <= characters:
        return repr(text)
    return f"{text[:characters]!r}... ({len(text)} characters)"


def first_line(error: BaseException) -> str:
    """What a library says, of at most one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up; the exception is no ``Exception`` and cannot be imported."""
    return type(error).__name__ == "PanicException"


def read_bytes(file: Path) -> bytes:
    """All of a tokenizer's file.

    Raises:
        UserError: not a regular file, too long, or it may not be read.
        TryAgain: the disk does not give it.
    """
    try:
        return files.read_bytes(file, MOST_BYTES)
    except OSError as error:
        raise unreadable(file, error) from error


def read_json(file: Path) -> Any:
    """What a file of JSON holds. Raises as :func:`read_bytes`, and where it is not JSON."""
    try:
        return files.read_json(file, MOST_BYTES)
    except OSError as error:
        raise unreadable(file, error) from error
    except files.UnusableFile as error:
        raise UserError(f"{error}; correct or remove it") from error


def check_ids(ids: Iterable[object], entries: int, what: str) -> None:
    """Refuses ids that no tokenizer has: libraries make tables as long as the largest id, and a stranger
    wrote it.

    Published tokenizers leave gaps, but have no ids far above the number of their entries.

    Args:
        ids: of all entries.
        entries: how many there are.
        what: begins the message; names the file and the part of it.

    Raises:
        UserError: one is not a whole number from 0 to 4 times the number of entries and 2^20.
    """
    limit = 4 * entries + (1 << 20)
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < limit:
            raise UserError(
                f"{what} has the id {str(token_id)[:60]}, but ids of {entries:,} tokens are whole numbers "
                f"from 0 to {limit - 1:,} at most; give another file"
            )


def find_eod(vocabulary: Mapping[str, int], config_file: Path | None) -> int | None:
    """The end-of-document id: the config's ``eos_token``, else the first of ``EOD_NAMES`` that there is.

    Raises:
        UserError: the config is not JSON, or names a token that the vocabulary lacks.
    """
    named = _eos_in_config(config_file) if config_file is not None else None
    if named is not None:
        if named not in vocabulary:
            raise UserError(
                f"{config_file}: eos_token is {shown(named)}, which the vocabulary lacks; correct one of them"
            )
        return vocabulary[named]
    return next((vocabulary[name] for name in EOD_NAMES if name in vocabulary), None)


def _eos_in_config(config_file: Path) -> str | None:
    config = read_json(config_file)
    token = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(token, dict):  # older files spell tokens as objects
        token = token.get("content")
    return token if isinstance(token, str) else None
