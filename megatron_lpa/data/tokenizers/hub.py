"""Tokenizers of the Hugging Face hub, with a bound on the time that a wrong name costs."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import exists, from_disk, is_dir, read_text

HUB_WAIT_S = 5.0
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FILE_ENDINGS = (".json", ".model", ".tiktoken", ".txt", ".jsonl")


def hub_files(name: str) -> tuple[Path, Path | None]:
    """``tokenizer.json`` and ``tokenizer_config.json`` (``None``: it has none) of the repository ``name``.

    A copy in the hub's cache serves without network. Where a folder of the first part of ``name`` exists
    here, a mistyped path is more likely than a repository, so only the cache is asked.

    Raises:
        UserError: no such name.
        TryAgain: no network, after at most ``HUB_WAIT_S`` seconds without an answer, or the cache's disk does
            not answer.
    """
    if not _HUB_NAME.fullmatch(name) or name.endswith(_FILE_ENDINGS):
        raise UserError(f"{name}: no such tokenizer file or folder; check the path")
    # Imported here: reading a local file should not pay for the hub's client.
    from huggingface_hub import constants

    parent, kind = Path(name).parent, UserError
    if constants.HF_HUB_OFFLINE:
        offline: str | None = "HF_HUB_OFFLINE forbids to ask the hub"
    elif parent != Path() and is_dir(parent):
        offline = f"the hub was not asked, because the folder {str(parent)!r} exists here"
    else:
        offline, kind = _why_unreachable(name), TryAgain
    file = _file_of(name, "tokenizer.json", offline)
    if file is None:
        raise _refusal(name, offline or "it has none", kind if offline else UserError)
    return file, _file_of(name, "tokenizer_config.json", offline)


def _file_of(name: str, file: str, offline: str | None) -> Path | None:
    """A file of the repository, in the hub's cache; None where there is none.

    Raises:
        TryAgain: it could not be had now.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, local_files_only=offline is not None))
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        if offline is not None:
            return _in_cache(name, file)
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _refusal(name, f"{file}: {type(error).__name__}", TryAgain) from error


def _in_cache(name: str, file: str) -> Path | None:
    """The file in the hub's cache, if it is there: its client takes any error of the disk for "not there"."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    if not exists(folder / "refs" / "main"):
        return None
    commit = from_disk(lambda: read_text(folder / "refs" / "main", 1 << 10), folder / "refs" / "main")
    path = folder / "snapshots" / commit / file
    return path if exists(path) else None


def _refusal(name: str, reason: str, kind: type[UserError] = UserError) -> UserError:
    return kind(
        f"tokenizer {name!r}: no such file or folder here; check the path. As the name of a repository on "
        f"the Hugging Face hub it needs network or a copy in the hub's cache, and a tokenizer.json ({reason})"
    )


def _why_unreachable(name: str) -> str | None:
    """Asks the hub once. ``None``: it has ``tokenizer.json`` of ``name``; else what went wrong.

    ``hf_hub_download`` would repeat a failed request for over 20 s. One request has a time limit, but per
    address of the host and without the look-up of its name; so a thread waits, and is left behind.

    Raises:
        UserError: the hub answered that there is no such repository or file, or that it may not be read.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    errors: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, "tokenizer.json"), timeout=HUB_WAIT_S)
            errors.append(None)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(HUB_WAIT_S)
    if not errors:
        return f"no answer in {HUB_WAIT_S:g} s"
    if isinstance(errors[0], HfHubHTTPError) and errors[0].response.status_code < 500:
        raise _refusal(name, f"the hub answered {errors[0].response.status_code}") from errors[0]
    return type(errors[0]).__name__ if errors[0] is not None else None
