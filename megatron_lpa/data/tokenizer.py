"""One face for Hugging Face ``tokenizer.json`` files and SentencePiece models.

``transformers`` is not used: given a folder with only a SentencePiece model, its automatic loading can
yield other ids than the model itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from megatron_lpa.errors import UserError

# Names under which tokenizers keep their end-of-document token, the most explicit first.
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<eod>", "<EOD>")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class Tokenizer(Protocol):
    """Text to ids and back.

    ``encode`` adds no special tokens of its own. ``vocab_size`` is one more than the largest id. ``eod_id``
    ends a document and is ``None`` where the tokenizer has no such token. ``fingerprint`` is the SHA-256 of
    the model file, in hex.
    """

    name: str
    vocab_size: int
    eod_id: int | None
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...


class HuggingFaceTokenizer:
    """A ``tokenizer.json``.

    A special token spelt out in the text becomes that token, as everywhere with such files.

    Args:
        name: what to call it in records.
        file: the ``tokenizer.json``.
        config_file: the ``tokenizer_config.json`` beside it, if any; its ``eos_token`` ends documents.
    """

    def __init__(self, name: str, file: Path, config_file: Path | None) -> None:
        data = _read(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the binding raises bare Exception
            raise UserError(f"{file}: not a tokenizer.json that tokenizers can read ({error})") from error
        # Files saved after fine-tuning often cut every text at a few hundred tokens, or pad it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = name
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eod_id = _find_eod(vocabulary, config_file)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class SentencePieceTokenizer:
    """A SentencePiece model.

    Args:
        name: what to call it in records.
        file: the ``.model`` file.
    """

    def __init__(self, name: str, file: Path) -> None:
        data = _read(file)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            if not data or not self._processor.LoadFromSerializedProto(data):
                raise RuntimeError("no model in it")
        except (RuntimeError, OSError) as error:
            raise UserError(f"{file}: not a SentencePiece model ({error}); give another file") from error
        self.name = name
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        eos_id: int = self._processor.eos_id()
        pieces = {self._processor.id_to_piece(i): i for i in range(self.vocab_size)} if eos_id < 0 else {}
        self.eod_id = eos_id if eos_id >= 0 else _find_eod(pieces, None)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # One thread: callers that want more run more processes.
        return self._processor.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        name_or_path: a folder with ``tokenizer.json`` or, failing that, ``tokenizer.model``; a
            ``tokenizer.json``; a SentencePiece ``.model`` file; or the name of a repository on the Hugging
            Face hub.

    Raises:
        UserError: there is no such thing, or it cannot be read.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _from_json(name_or_path, path / "tokenizer.json")
        if (path / "tokenizer.model").is_file():
            return SentencePieceTokenizer(name_or_path, path / "tokenizer.model")
        raise UserError(f"{path}: neither tokenizer.json nor tokenizer.model in this folder; give another")
    if path.is_file():
        if path.suffix == ".json":
            return _from_json(name_or_path, path)
        if ".model" in path.suffixes:
            return SentencePieceTokenizer(name_or_path, path)
        raise UserError(
            f"{path}: unknown kind; give a tokenizer.json, a SentencePiece .model, or their folder"
        )
    if not _HUB_NAME.fullmatch(name_or_path) or name_or_path.endswith((".json", ".model")):
        raise UserError(f"{name_or_path}: no such tokenizer file or folder; check the path")
    return _from_hub(name_or_path)


def _from_json(name: str, file: Path) -> HuggingFaceTokenizer:
    config_file = file.with_name("tokenizer_config.json")
    return HuggingFaceTokenizer(name, file, config_file if config_file.is_file() else None)


def _from_hub(name: str) -> HuggingFaceTokenizer:
    # Imported here: reading a local file should not pay for the hub's client. It comes with tokenizers.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        raise UserError(
            f"tokenizer {name!r}: no such file or folder here, and the Hugging Face hub did not give its "
            f"tokenizer.json ({type(error).__name__}); check the name and the network, or give a local path"
        ) from error
    try:
        config_file = Path(hf_hub_download(name, "tokenizer_config.json"))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return HuggingFaceTokenizer(name, file, None)
    return HuggingFaceTokenizer(name, file, config_file)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def _find_eod(vocabulary: dict[str, int], config_file: Path | None) -> int | None:
    named = _eos_in_config(config_file) if config_file is not None else None
    if named is not None:
        if named not in vocabulary:
            raise UserError(
                f"{config_file}: eos_token is {named!r}, which the vocabulary lacks; correct one of them"
            )
        return vocabulary[named]
    return next((vocabulary[name] for name in EOD_NAMES if name in vocabulary), None)


def _eos_in_config(config_file: Path) -> str | None:
    try:
        config: Any = json.loads(_read(config_file))
    except ValueError as error:
        raise UserError(f"{config_file}: not valid JSON ({error}); correct or remove it") from error
    token = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(token, dict):  # older files spell tokens as objects
        token = token.get("content")
    return token if isinstance(token, str) else None


def save_tokenizer(name_or_path: str, folder: Path) -> None:
    """Keep a copy of a local tokenizer's files, which ``load_tokenizer`` reads back. Hub names have none."""
    path = Path(name_or_path)
    if not path.exists() or (folder.exists() and path.resolve() == folder.resolve()):
        return
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    files = (
        [path / name for name in names] if path.is_dir() else [path, path.with_name("tokenizer_config.json")]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.is_file():
            target = file.name if file.name in names else f"tokenizer{file.suffix}"
            shutil.copyfile(file, folder / target)
