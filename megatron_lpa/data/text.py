"""Readers of raw text: JSON lines, plain or compressed, and text files.

Reading has two halves. ``read_raw`` finds the records of a file without looking inside them, which is cheap
and happens in one process; ``parse`` decodes one record, which is dear and can happen in any process.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from megatron_lpa.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".txt")
_READ_BYTES = 1 << 16  # compressed bytes at a time; text expands to a few times that
_ZSTD_MAX_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` needs


@dataclass(frozen=True)
class RawRecord:
    """One document before decoding: a JSON line, or a whole text file (``line`` is then 0)."""

    path: str
    line: int
    data: bytes

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


def resolve_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files that paths, folders and glob patterns name, in the order given, each expanded and sorted.

    Folders are searched to any depth for the endings in ``SUFFIXES``; hidden files are passed over.

    Raises:
        UserError: nothing matches, an ending is unknown, or a file is named twice.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.is_file() and _is_visible_text(p.relative_to(path))
            )
            if not found:
                raise UserError(f"{name}: no text in this folder; known endings: {', '.join(SUFFIXES)}")
        elif path.is_file():
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
            if not found:
                raise UserError(
                    f"{name}: no such file, and no file matches it; check the path or the pattern"
                )
        files += found
    seen: set[Path] = set()
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file}: unknown ending; known: {', '.join(SUFFIXES)}")
        if file.resolve() in seen:
            raise UserError(f"{file}: named twice, so its text would be there twice; name it once")
        seen.add(file.resolve())
    return files


def _is_visible_text(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not any(part.startswith(".") for part in path.parts)


def read_raw(path: Path) -> Iterator[RawRecord]:
    """Yields the records of one file, one at a time: each non-blank line, or all of a ``.txt`` file.

    Raises:
        UserError: the file cannot be read, or its compressed stream is damaged or cut short.
    """
    name = str(path)
    try:
        with path.open("rb") as stream:
            if name.endswith((".gz", ".zst")) and not path.stat().st_size:
                raise EOFError  # even an empty text has a header when compressed
            if name.endswith(".txt"):
                yield RawRecord(name, 0, stream.read())
                return
            for number, line in enumerate(_lines(path, stream), start=1):
                if line.strip():
                    yield RawRecord(name, number, line)
    except EOFError as error:
        raise UserError(f"{path}: the compressed file is cut short; copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: the compressed file is damaged ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _lines(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    if path.name.endswith(".gz"):
        with gzip.open(stream, "rb") as plain:
            yield from plain
    elif path.name.endswith(".zst"):
        yield from _split_lines(_zstd_blocks(stream))
    else:
        yield from stream


def _zstd_blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Decompressed blocks of all frames. zstandard's own stream reader takes a cut-off frame for the end."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    frame = None
    while data := stream.read(_READ_BYTES):
        while data:
            frame = frame or decompressor.decompressobj()
            if block := frame.decompress(data):
                yield block
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError


def _split_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []  # pieces of a line that no block has ended yet
    for block in blocks:
        first, newline, rest = block.partition(b"\n")
        pending.append(first)
        if not newline:
            continue
        yield b"".join(pending)
        *whole, last = rest.split(b"\n")
        yield from whole
        pending = [last]
    if any(pending):
        yield b"".join(pending)


def parse(record: RawRecord, keys: Sequence[str]) -> list[str]:
    """The text under each of ``keys``; a text file is the text of the only key.

    Raises:
        UserError: the record is not valid UTF-8 or JSON, or lacks a key, or the value is no text.
    """
    text = _decode(record)
    if record.line == 0:
        if len(keys) != 1:
            raise UserError(f"{record.path}: a text file has no keys; give one --json-keys, or JSON lines")
        return [text]
    document = _load_json(record, text)
    values: list[str] = []
    for key in keys:
        if key not in document:
            raise UserError(
                f"{record.place}: no key {key!r}; this line has {_some(list(document))}: "
                "choose with --json-keys"
            )
        value = document[key]
        if not isinstance(value, str):
            raise UserError(
                f"{record.place}: the value of {key!r} is {_kind(value)}, not a string; "
                "choose another key or mend the line"
            )
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{record.place}: the value of {key!r} has half a surrogate pair (\\ud800 to \\udfff), "
                    "which is no character; mend or drop the line"
                ) from None
        values.append(value)
    return values


def _decode(record: RawRecord) -> str:
    data = record.data
    if record.line <= 1 and data.startswith(b"\xef\xbb\xbf"):  # the byte-order mark some editors put first
        data = data[3:]
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{record.place}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start} "
            f"{'of the line' if record.line else 'of the file'}); convert the file, for example with iconv"
        ) from None


def _load_json(record: RawRecord, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "mend or drop the line"
        if record.line == 1 and text.lstrip()[:1] in ("[", "{"):
            hint += "; a file that is one JSON document has to become one object per line (jq -c '.[]')"
        raise UserError(f"{record.place}: not valid JSON ({error}); {hint}") from None
    if not isinstance(document, dict):
        raise UserError(
            f"{record.place}: {_kind(document)}, not an object; each line has to be one, "
            'as {"text": "..."} (for one JSON array: jq -c \'.[]\')'
        )
    return document


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _some(keys: list[str]) -> str:
    if not keys:
        return "no keys"
    return ", ".join(repr(key) for key in keys[:8]) + (", ..." if len(keys) > 8 else "")


def read_texts(inputs: Sequence[str], key: str = "text") -> Iterator[str]:
    """Every text of the inputs, in order, one at a time.

    Raises:
        UserError: as :func:`resolve_inputs`, :func:`read_raw` and :func:`parse`.
    """
    for path in resolve_inputs(inputs):
        for record in read_raw(path):
            yield parse(record, [key])[0]
