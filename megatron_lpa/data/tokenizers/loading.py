"""One face for ``tokenizer.json`` files, SentencePiece models and tiktoken ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_lpa.data.tokenizers.base import EOD_NAMES, Tokenizer
from megatron_lpa.data.tokenizers.hub import hub_files
from megatron_lpa.data.tokenizers.reference import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_lpa.data.tokenizers.tiktoken_ranks import TiktokenTokenizer, config_files
from megatron_lpa.errors import UserError
from megatron_lpa.files import read_bytes, write_whole

__all__ = ["EOD_NAMES", "Tokenizer", "load_tokenizer", "save_tokenizer"]

MOST_FILE_BYTES = 1 << 30
"""Of one file of a tokenizer: far more than any has."""


def load_tokenizer(
    name_or_path: str, engine: Literal["auto", "reference"] = "reference", probed: bool = False
) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        name_or_path: a folder with ``tokenizer.json`` or, failing that, ``tokenizer.model`` or one
            ``.tiktoken`` file; one of these files; or the name of a repository on the Hugging Face hub.
        engine: ``"reference"`` is the library that the file is made for. ``"auto"`` puts gigatoken before it
            where the two give the same ids, and else says in ``fallback_reason`` why not.
        probed: another process has found that they do, so that this one need not compare them again.

    Raises:
        UserError: there is no such thing, or it cannot be read.
    """
    reference = _load_reference(name_or_path)
    if engine == "reference":
        return reference
    # Imported here: only preprocessing pays for gigatoken.
    from megatron_lpa.data.tokenizers.fast import accelerate

    return accelerate(reference, probed)


def _load_reference(name_or_path: str) -> Tokenizer:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _from_file(name_or_path, _file_in(path))
    if path.exists():
        return _from_file(name_or_path, path)
    file, config_file = hub_files(name_or_path)
    return HuggingFaceTokenizer(name_or_path, file, config_file)


def _file_in(folder: Path) -> Path:
    for file in (folder / "tokenizer.json", folder / "tokenizer.model"):
        if file.is_file():
            return file
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) > 1:
        raise UserError(f"{folder}: {len(ranks)} .tiktoken files in this folder; give one of them")
    if not ranks:
        raise UserError(
            f"{folder}: neither tokenizer.json nor tokenizer.model nor a .tiktoken file in this folder; "
            "give another"
        )
    return ranks[0]


def _from_file(name: str, file: Path) -> Tokenizer:
    if file.suffix == ".json":
        config_file = file.with_name("tokenizer_config.json")
        return HuggingFaceTokenizer(name, file, config_file if config_file.is_file() else None)
    if ".model" in file.suffixes:
        return SentencePieceTokenizer(name, file)
    if file.suffix == ".tiktoken":
        return TiktokenTokenizer(name, file)
    raise UserError(
        f"{file}: unknown kind; give a tokenizer.json, a SentencePiece .model, a .tiktoken file, "
        "or their folder"
    )


def save_tokenizer(name_or_path: str, folder: Path) -> None:
    """Keep a copy of a local tokenizer's files, which ``load_tokenizer`` reads back. Hub names have none.

    Links in ``folder`` are replaced, not followed; that it is none itself is up to the caller.

    Raises:
        UserError: a folder without a tokenizer.
        OSError: a copy cannot be written.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists() or (folder.exists() and path.resolve() == folder.resolve()):
        return
    file = _file_in(path) if path.is_dir() else path
    if file.suffix == ".tiktoken":
        # Under its own name: the name of a published encoding stands for its pattern.
        copies = {source: source.name for source in (file, *config_files(file))}
    elif file.suffix == ".json":
        copies = {file: "tokenizer.json"}
    else:
        copies = {file: "tokenizer.model"}
    copies[file.with_name("tokenizer_config.json")] = "tokenizer_config.json"
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in copies.items():
        if source.is_file():
            write_whole(folder / target, read_bytes(source, MOST_FILE_BYTES))
