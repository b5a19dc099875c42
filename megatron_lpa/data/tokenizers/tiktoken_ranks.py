"""tiktoken rank files: ``<base64 of a token's bytes> <rank>`` a line, and the pattern that is not in them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tiktoken

from megatron_lpa.data.tokenizers.tokenizer import (
    check_ids,
    find_eod,
    first_line,
    is_panic,
    read_bytes,
    read_json,
    shortened,
    to_arrays,
)
from megatron_lpa.errors import UserError, shown
from megatron_lpa.files import exists

_R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pattern and special tokens of the published encodings, by file name without ending.
_ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (_R50K, {"<|endoftext|>": 50256}),
    "r50k_base": (_R50K, {"<|endoftext|>": 50256}),
    "p50k_base": (_R50K, {"<|endoftext|>": 50256}),
    "cl100k_base": (
        _CL100K,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
# Some patterns have an older spelling that is still around. That of _R50K divides every text alike, that of
# _CL100K (LLaMA-3 has it too) does not: it ends a word after the last line break of "\n ".
GIGATOKEN_SCHEMES = {
    _R50K: "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    _CL100K: "gpt4",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ): "olmo3",
    _O200K: "o200k",
}
"""gigatoken's name of the scheme for a pattern; the probe proves each for the ranks at hand."""


class TiktokenTokenizer:
    """A ``.tiktoken`` rank file.

    The file lacks the pattern that divides text into words, and the special tokens. They come from
    ``<name>.json`` beside ``<name>.tiktoken``, from a ``tokenizer_config.json`` beside it (either with keys
    ``pat_str`` and ``special_tokens``), or from the file's name where that is a published encoding's:
    ``gpt2``, ``r50k_base``, ``p50k_base``, ``cl100k_base`` or ``o200k_base``.

    A special token spelt out in a text is ordinary text (tiktoken's ``encode_ordinary``). Documents end with
    ``<|endoftext|>``, unless ``eos_token`` in the ``tokenizer_config.json`` names another special token.

    Args:
        name: what to call it in records.
        file: the ``.tiktoken`` file.

    Raises:
        UserError: a file that cannot be read, is none of these, or whose pattern is unknown.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.data = read_bytes(file)
        ranks = _parse_ranks(self.data, file)
        self.pattern, special = _definition(file)
        check_ids(special.values(), len(ranks) + len(special), f"{file}: a special token")
        taken = set(ranks.values())
        for token, token_id in special.items():
            if token_id in taken:
                raise UserError(
                    f"{file}: id {token_id} of special token {shown(token)} is taken; correct one"
                )
            taken.add(token_id)
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except ValueError as error:
            raise UserError(
                f"{file}: tiktoken cannot use its pat_str ({first_line(error)}); correct it"
            ) from error
        definition = json.dumps([self.pattern, sorted(special.items())]).encode()
        self.name = name
        self.engine = "tiktoken"
        self.fallback_reason: str | None = None
        self.fingerprint = hashlib.sha256(self.data + definition).hexdigest()
        self.vocab_size = max(taken) + 1
        config_file = file.with_name("tokenizer_config.json")
        self.eod_id = find_eod(special, config_file if exists(config_file) else None)

    def encode(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            if not is_panic(error):
                raise
            # The pattern engine's stack ends at about a million blanks in a row.
            _refuse(text, error)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_batch_arrays(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Tokenizer``: uint32 ``(tokens,)`` and int64 ``(len(texts),)``."""
        return to_arrays(self.encode_batch(texts))

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


def config_files(file: Path) -> list[Path]:
    """Where the pattern of ``file`` may be, the most specific first."""
    return [file.with_suffix(".json"), file.with_name("tokenizer_config.json")]


def _refuse(text: str, error: BaseException) -> NoReturn:
    raise UserError(
        f"tiktoken cannot encode the text {shortened(text)}, which has a run of blanks that is too long "
        "for its pattern engine; shorten the run, or encode with --engine auto"
    ) from error


def _parse_ranks(data: bytes, file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = _not_negative(int(rank))
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{file}:{number}: not '<base64> <rank>', so this is not a tiktoken rank file "
                f"({first_line(error)})"
            ) from error
    check_ids(ranks.values(), len(ranks), f"{file}: a token")
    if len(set(ranks.values())) < len(ranks):
        raise UserError(f"{file}: two tokens have the same rank; give another file")
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise UserError(
            f"{file}: no rank for byte {missing[0]}, so some texts have no ids; give another file"
        )
    return ranks


def _not_negative(rank: int) -> int:
    if rank < 0:
        raise ValueError(f"rank {rank}")
    return rank


def _definition(file: Path) -> tuple[str, dict[str, int]]:
    for config_file in config_files(file):
        config: Any = read_json(config_file) if exists(config_file) else None
        if isinstance(config, dict) and "pat_str" in config:
            return _checked(config["pat_str"], config.get("special_tokens", {}), config_file)
    if file.stem in _ENCODINGS:
        return _ENCODINGS[file.stem]
    raise UserError(
        f"{file}: a rank file lacks the pattern that divides text, and {file.stem!r} is not a published "
        f"encoding ({', '.join(_ENCODINGS)}); put it beside, in {file.stem}.json: "
        '{"pat_str": "...", "special_tokens": {"<|endoftext|>": ID}}'
    )


def _checked(pattern: Any, special: Any, config_file: Path) -> tuple[str, dict[str, int]]:
    if not isinstance(pattern, str) or not pattern:
        raise UserError(f"{config_file}: pat_str is {shown(pattern)}; give the pattern as a string")
    if not isinstance(special, dict) or not all(
        re.search(r"\S", token) and type(token_id) is int for token, token_id in special.items()
    ):
        raise UserError(
            f"{config_file}: special_tokens is {shown(special)}; give an object such as "
            '{"<|endoftext|>": 50256}'
        )
    return pattern, special
