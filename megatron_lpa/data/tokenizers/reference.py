"""The plain libraries: Hugging Face's tokenizers and SentencePiece.

``transformers`` is not used: given a folder with only a SentencePiece model, its automatic loading can
yield other ids than the model itself.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import sentencepiece
import tokenizers

from megatron_lpa.data.tokenizers.tokenizer import (
    check_ids,
    find_eod,
    first_line,
    is_panic,
    read_bytes,
    to_arrays,
)
from megatron_lpa.errors import UserError


class HuggingFaceTokenizer:
    """A ``tokenizer.json``.

    A special token spelt out in the text becomes that token, as everywhere with such files.

    Args:
        name: what to call it in records.
        file: the ``tokenizer.json``.
        config_file: the ``tokenizer_config.json`` beside it, if any; its ``eos_token`` ends documents.

    Raises:
        UserError: a file that cannot be read or is none of these.
    """

    def __init__(self, name: str, file: Path, config_file: Path | None) -> None:
        self.data = read_bytes(file)
        _check_content(self.data, file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.data)
        except BaseException as error:  # the binding raises bare Exception, and panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise UserError(
                f"{file}: not a tokenizer.json that tokenizers can read ({first_line(error)}); give another "
                "file"
            ) from error
        # Files saved after fine-tuning often cut every text at a few hundred tokens, or pad it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = name
        self.engine = "tokenizers"
        self.fallback_reason: str | None = None
        self.fingerprint = hashlib.sha256(self.data).hexdigest()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eod_id = find_eod(vocabulary, config_file)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_batch_arrays(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Tokenizer``: uint32 ``(tokens,)`` and int64 ``(len(texts),)``."""
        return to_arrays(self.encode_batch(texts))

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _check_content(data: bytes, file: Path) -> None:
    """Looks at all ids before the library does.

    Raises:
        UserError: it is not JSON, or has ids that cannot be.
    """
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise UserError(
            f"{file}, line {error.lineno}: not valid JSON ({error.msg}); give another tokenizer.json"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a tokenizer.json: it holds no JSON object; give another file")
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # Of a unigram model the vocabulary is a list: its ids are the places in it.
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    entries = len(vocabulary) if isinstance(vocabulary, (dict, list)) else 0
    added_ids = (
        [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    )
    entries += len(added_ids)
    check_ids(ids, entries, f"{file}: model.vocab")
    check_ids(added_ids, entries, f"{file}: added_tokens")
    if len(set(ids)) < len(ids):
        twice = next(token_id for token_id, count in Counter(ids).items() if count > 1)
        raise UserError(f"{file}: model.vocab has the id {twice} twice; give another file")


class SentencePieceTokenizer:
    """A SentencePiece model.

    Its control pieces, such as ``<s>``, are ordinary text where a text spells them out.

    Args:
        name: what to call it in records.
        file: the ``.model`` file.

    Raises:
        UserError: a file that cannot be read or is none of these.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.data = read_bytes(file)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            if not self.data or not self._processor.LoadFromSerializedProto(self.data):
                raise RuntimeError("no model in it")
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{file}: not a SentencePiece model ({first_line(error)}); give another file"
            ) from error
        self.name = name
        self.engine = "sentencepiece"
        self.fallback_reason: str | None = None
        self.fingerprint = hashlib.sha256(self.data).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        eos_id: int = self._processor.eos_id()
        pieces = {self._processor.id_to_piece(i): i for i in range(self.vocab_size)} if eos_id < 0 else {}
        self.eod_id = eos_id if eos_id >= 0 else find_eod(pieces, None)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # One thread: callers that want more run more processes.
        return self._processor.encode(texts, out_type=int, num_threads=1)

    def encode_batch_arrays(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Tokenizer``: uint32 ``(tokens,)`` and int64 ``(len(texts),)``."""
        return to_arrays(self.encode_batch(texts))

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def control_pieces(self) -> list[str]:
        """Pieces that no text yields, such as ``<s>`` and ``</s>``."""
        return [
            self._processor.id_to_piece(i) for i in range(self.vocab_size) if self._processor.is_control(i)
        ]

    def unscored_pieces(self) -> list[str]:
        """Pieces with a score of 0, the user-defined ones among them; the library does not tell which."""
        processor = self._processor
        return [
            processor.id_to_piece(i)
            for i in range(self.vocab_size)
            if processor.get_score(i) == 0 and not processor.is_byte(i) and not processor.is_control(i)
        ]
