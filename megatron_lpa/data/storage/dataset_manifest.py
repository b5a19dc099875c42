"""What is known of a dataset besides its tokens: ``<prefix>.json``, beside ``<prefix>.bin`` and ``.idx``."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_lpa.data.storage.checksums import BLOCK_BYTES
from megatron_lpa.data.storage.partial_file import write_json
from megatron_lpa.errors import UserError, named, shown
from megatron_lpa.files import UnusableFile, read_json, unreadable

FORMAT = 2
# The Pile's, of 51 billion tokens, has 0.2 MB: 1,600 checksums and 30 sources. A source for each of a million
# input files are 0.4 GB.
MOST_MANIFEST_BYTES = 1 << 30
MOST_CHARACTERS = 4096
"""Of a text: the longest path that Linux takes. Names of subsets may be longer."""

_NO_TEXT = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONGEST_ERROR = 300
_REPAIR = "preprocess the text again, or remove the file to do without what it says"


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the ids. ``fingerprint`` is the SHA-256 of its model file, in hex."""

    name: str
    fingerprint: str
    vocab_size: int
    eod_id: int | None


@dataclass(frozen=True)
class SourceRecord:
    """One input file, or one split of a Hugging Face dataset.

    Args:
        path: of the file, or name of the dataset.
        size_bytes: of the file; 0 for a dataset.
        sha256: of the file as it lies on disk, in hex; ``None`` for a dataset.
        documents: that it gave.
        config, split, revision: of a dataset; the revision is the hub's commit, or a hash over the names,
            sizes and dates of a local folder's files.
    """

    path: str
    size_bytes: int
    sha256: str | None
    documents: int
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class SubsetCount:
    """What one named subset (``meta.pile_set_name`` in the Pile) gave."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class Checksums:
    """Hex SHA-256 of every ``block_bytes`` of the two files, in order."""

    bin: list[str]
    idx: list[str]
    block_bytes: int = BLOCK_BYTES


@dataclass(frozen=True)
class Manifest:
    """The record of one dataset.

    Args:
        documents: documents in the dataset.
        tokens: tokens in the dataset, end-of-document tokens included.
        empty_documents: left out because they had no tokens.
        dropped_documents: left out because of their subset.
        rejected_documents: left out because their record was bad; the reject file has each.
        bytes_text: UTF-8 bytes of the documents kept.
        words: blank-separated words of the documents kept.
        dtype: of the ids, ``uint16`` or ``int32``.
        json_key: the key whose text was tokenized.
        append_eod: whether every document ends with the end-of-document token.
        tokenizer: what made the ids.
        checksums: of the two files.
        sources: the input files, in order.
        subsets: counts by named subset; empty where records name none.
        keep_subsets: the only subsets kept; empty where all were.
        drop_subsets: the subsets to be left out.
        dropped_subsets: documents left out because of their subset, by its name.
        job: of a shard, hex SHA-256 of everything that decides the output of all shards.
        shard: of a shard, its number, from 0, and how many there are.
        version: of megatron_lpa.
    """

    documents: int
    tokens: int
    empty_documents: int
    dropped_documents: int
    rejected_documents: int
    bytes_text: int
    words: int
    dtype: str
    json_key: str
    append_eod: bool
    tokenizer: TokenizerRecord
    checksums: Checksums
    sources: list[SourceRecord]
    subsets: dict[str, SubsetCount] = field(default_factory=dict)
    keep_subsets: list[str] = field(default_factory=list)
    drop_subsets: list[str] = field(default_factory=list)
    dropped_subsets: dict[str, int] = field(default_factory=dict)
    job: str | None = None
    shard: list[int] | None = None
    version: str = ""


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Writes ``<prefix>.json``, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_json(manifest_path(prefix), {"format": FORMAT, **asdict(manifest)})


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The record of a dataset; ``None`` where there is none, as beside data that other tools wrote.

    Raises:
        UserError: the file is damaged, of another format, or may not be read.
        TryAgain: the disk does not give it.
    """
    path = manifest_path(prefix)
    try:
        content: Any = read_json(path, MOST_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    except UnusableFile as error:
        raise UserError(f"{error}; {_REPAIR}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a dataset manifest of format {FORMAT}; {_REPAIR}")
    try:
        return _from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = repr(error)  # Python's own words quote keys whole
        said = said if len(said) <= _LONGEST_ERROR else f"{said[:_LONGEST_ERROR]}..."
        raise UserError(f"{path}: a damaged manifest ({said}); {_REPAIR}") from error


def _from_json(content: dict[str, Any]) -> Manifest:
    """Raises KeyError, TypeError or ValueError where anything is not as :func:`write_manifest` writes it."""
    values = {key: value for key, value in content.items() if key != "format"}
    values["tokenizer"] = TokenizerRecord(**values["tokenizer"])
    values["checksums"] = Checksums(**values["checksums"])
    values["sources"] = [SourceRecord(**source) for source in values["sources"]]
    values["subsets"] = {name: SubsetCount(**count) for name, count in values["subsets"].items()}
    manifest = Manifest(**values)
    _check_values(manifest)
    return manifest


def _check_values(manifest: Manifest) -> None:
    counts = ("documents", "tokens", "empty_documents", "dropped_documents", "rejected_documents")
    for name in (*counts, "bytes_text", "words"):
        _whole(getattr(manifest, name), name)
    for name in ("dtype", "json_key", "version"):
        _text(getattr(manifest, name), name)
    if not isinstance(manifest.append_eod, bool):
        raise ValueError(f"append_eod is {shown(manifest.append_eod)}")
    tokenizer = manifest.tokenizer
    _text(tokenizer.name, "tokenizer.name")
    _text(tokenizer.fingerprint, "tokenizer.fingerprint")
    _whole(tokenizer.vocab_size, "tokenizer.vocab_size")
    if tokenizer.eod_id is not None:
        _whole(tokenizer.eod_id, "tokenizer.eod_id")
    for source in manifest.sources:
        _text(source.path, "sources.path")
        _whole(source.size_bytes, "sources.size_bytes")
        _whole(source.documents, "sources.documents")
        for name in ("sha256", "config", "split", "revision"):
            if getattr(source, name) is not None:
                _text(getattr(source, name), f"sources.{name}")
    for name, count in manifest.subsets.items():
        _text(name, "subsets", None)
        _whole(count.documents, f"subsets.{named(name)}.documents")
        _whole(count.tokens, f"subsets.{named(name)}.tokens")
    for name in ("keep_subsets", "drop_subsets"):
        subsets = getattr(manifest, name)
        if not isinstance(subsets, list):
            raise ValueError(f"{name} is {shown(subsets)}")
        for subset in subsets:
            _text(subset, name, None)
    for name, count_ in manifest.dropped_subsets.items():
        _text(name, "dropped_subsets", None)
        _whole(count_, f"dropped_subsets.{named(name)}")
    if manifest.job is not None:
        _text(manifest.job, "job")
    if manifest.shard is not None:
        if not isinstance(manifest.shard, list) or len(manifest.shard) != 2:
            raise ValueError(f"shard is {shown(manifest.shard)}")
        for number in manifest.shard:
            _whole(number, "shard")
    checksums = manifest.checksums
    if _whole(checksums.block_bytes, "checksums.block_bytes") == 0:
        raise ValueError("checksums.block_bytes is 0")
    for name, digests in (("bin", checksums.bin), ("idx", checksums.idx)):
        if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
            raise ValueError(f"checksums.{name} is not a list of digests")


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"{name} is {shown(value)}")
    return value


def _text(value: object, name: str, most: int | None = MOST_CHARACTERS) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}")
    if reason := why_unfit(value, most):
        raise ValueError(f"{name} is {shown(value)}, {reason}")


def why_unfit(text: str, most: int | None = MOST_CHARACTERS) -> str | None:
    """Why a text cannot be part of a manifest, whose texts go into messages of one line; None if it can.

    Args:
        text: a name, a path or a hash.
        most: characters; None for any number.
    """
    if found := _NO_TEXT.search(text):
        if found[0] >= "\ud800":
            return "which is not UTF-8"
        return f"in which {shown(found[0])} has no place"
    if most is not None and len(text) > most:
        return f"of {len(text):,} characters, and {most:,} are the most"
    return None
