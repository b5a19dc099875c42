"""One face for ``tokenizer.json`` files, SentencePiece models and tiktoken ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from megatron_lpa.data.tokenizers.hub import hub_files
from megatron_lpa.data.tokenizers.reference import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_lpa.data.tokenizers.tiktoken_ranks import TiktokenTokenizer, config_files
from megatron_lpa.data.tokenizers.tokenizer import EOD_NAMES, Tokenizer, read_bytes
from megatron_lpa.errors import UserError
from megatron_lpa.files import exists, from_disk, is_dir, write_whole

__all__ = ["EOD_NAMES", "Tokenizer", "load_tokenizer", "local_path", "save_tokenizer"]


_OWN_NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


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
        TryAgain: the disk or the network does not give it.
    """
    reference = _load_reference(name_or_path)
    if engine == "reference":
        return reference
    # Imported here: only preprocessing pays for gigatoken.
    from megatron_lpa.data.tokenizers.fast import accelerate

    return accelerate(reference, probed)


def _load_reference(name_or_path: str) -> Tokenizer:
    path = local_path(name_or_path)
    if is_dir(path):
        return _from_file(name_or_path, _file_in(path))
    if exists(path):
        return _from_file(name_or_path, path)
    file, config_file = hub_files(name_or_path)
    return HuggingFaceTokenizer(name_or_path, file, config_file)


def local_path(name_or_path: str) -> Path:
    """Where a tokenizer would be, if its name is that of a file or folder.

    Raises:
        UserError: the name begins with the home folder of nobody.
    """
    try:
        return Path(name_or_path).expanduser()
    except RuntimeError as error:  # no such user
        raise UserError(
            f"{name_or_path}: no such tokenizer file or folder ({error}); check the path"
        ) from None


def _file_in(folder: Path) -> Path:
    for file in (folder / "tokenizer.json", folder / "tokenizer.model"):
        if exists(file):
            return file
    names = from_disk(lambda: os.listdir(folder), folder)
    ranks = sorted(folder / name for name in names if name.endswith(".tiktoken"))
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
        return HuggingFaceTokenizer(name, file, config_file if exists(config_file) else None)
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

    Files of a tokenizer of another kind in ``folder`` go: ``load_tokenizer`` could take them for this one's.

    Links in ``folder`` are replaced, not followed; that it is none itself is up to the caller.

    Raises:
        UserError: a folder without a tokenizer, or a file that cannot be read.
        TryAgain: the disk does not give a file.
        OSError: a copy cannot be written.
    """
    path = local_path(name_or_path)
    if not exists(path) or (exists(folder) and path.resolve() == folder.resolve()):
        return
    file = _file_in(path) if is_dir(path) else path
    if file.suffix == ".tiktoken":
        # Under its own name: the name of a published encoding stands for its pattern.
        copies = {source: source.name for source in (file, *config_files(file))}
    elif file.suffix == ".json":
        copies = {file: "tokenizer.json"}
    else:
        copies = {file: "tokenizer.model"}
    copies[file.with_name("tokenizer_config.json")] = "tokenizer_config.json"
    folder.mkdir(parents=True, exist_ok=True)
    written = {target: read_bytes(source) for source, target in copies.items() if exists(source)}
    for target, content in written.items():
        write_whole(folder / target, content)
    for name in from_disk(lambda: os.listdir(folder), folder):
        if name not in written and (name in _OWN_NAMES or name.endswith(".tiktoken")):
            (folder / name).unlink()
