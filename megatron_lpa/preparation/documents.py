"""What records mean: JSON lines, table rows and text files to the text of documents.

A record is either a document, or dropped because of its subset, or bad. Bad records are returned with the
reason and never raise; what happens to them is the caller's policy.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import orjson

from megatron_lpa.errors import UserError
from megatron_lpa.preparation.readers import Chunk, SourceReader
from megatron_lpa.preparation.sources import file_sources

PILE_SUBSET = "meta.pile_set_name"


@dataclass(frozen=True)
class Selection:
    """What is wanted of every record.

    Args:
        keys: top-level keys whose text is wanted.
        subset_key: where a record names its subset, keys joined by dots; ``None`` reads no subset.
        keep: names of the only subsets wanted; empty wants all.
        drop: names of subsets not wanted.
    """

    keys: tuple[str, ...] = ("text",)
    subset_key: str | None = None
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The top-level keys that hold all this."""
        subset = [self.subset_key.split(".")[0]] if self.subset_key else []
        return tuple(dict.fromkeys([*self.keys, *subset]))


@dataclass(frozen=True)
class Rejection:
    """A bad record.

    Args:
        source: name of the source.
        number: line or row, from 1; 0 for a text file.
        reason: what is wrong and what to do.
        data: the line as it was; empty for rows.
    """

    source: str
    number: int
    reason: str
    data: bytes

    @property
    def message(self) -> str:
        return (
            f"{self.source}:{self.number}: {self.reason}" if self.number else f"{self.source}: {self.reason}"
        )

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"source": self.source, "line": self.number, "reason": self.reason}
        try:
            record["record"] = self.data.decode()
        except UnicodeDecodeError:
            record["record_base64"] = base64.b64encode(self.data).decode()
        return record


@dataclass
class Documents:
    """The documents of a chunk, in order.

    Args:
        texts: for each key, the text of every document.
        subsets: for every document the name of its subset, ``None`` where it has none.
        dropped: records left out because of their subset, by its name.
        rejected: the bad records.
    """

    texts: list[list[str]]
    subsets: list[str | None] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)


class _BadRecord(Exception):
    pass


def parse_chunk(chunk: Chunk, selection: Selection) -> Documents:
    """Takes the wanted documents out of a chunk."""
    if chunk.kind == "lines" and (documents := _parse_plain_lines(chunk, selection)) is not None:
        return documents
    documents = Documents([[] for _ in selection.keys])
    for number, record, data in _records(chunk, selection):
        try:
            if isinstance(record, _BadRecord):
                raise record
            texts, subset = _document(record, selection)
            if not _wanted(subset, selection):
                name = subset or ""
                documents.dropped[name] = documents.dropped.get(name, 0) + 1
                continue
        except _BadRecord as bad:
            documents.rejected.append(Rejection(chunk.source, number, str(bad), data))
            continue
        for values, text in zip(documents.texts, texts, strict=True):
            values.append(text)
        documents.subsets.append(subset)
    return documents


def _parse_plain_lines(chunk: Chunk, selection: Selection) -> Documents | None:
    """The quick way, for chunks where nothing is unusual; ``None`` leaves it to the careful way.

    Nothing is unusual when every line is JSON, has every key exactly once, with a string, and names a subset
    if that matters. As many keys as lines, and a key in every line, mean one in each.
    """
    for key in map(_KeySpellings, selection.keys):
        if not key.is_counted_in(chunk.data) or chunk.data.count(key.plain) != chunk.count:
            return None
    lines = chunk.data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    try:
        records = [orjson.loads(line) for line in lines]
        texts = [[record[key] for record in records] for key in selection.keys]
        subsets = [_subset(record, selection) for record in records]
    except (ValueError, KeyError, TypeError, _BadRecord):
        return None
    if any(set(map(type, values)) - {str} for values in texts):
        return None
    documents = Documents(texts, subsets)
    if selection.keep or selection.drop:
        wanted = [_wanted(subset, selection) for subset in subsets]
        documents.texts = [list(compress(values, wanted)) for values in texts]
        documents.subsets = list(compress(subsets, wanted))
        documents.dropped = dict(
            Counter(s or "" for s, keep in zip(subsets, wanted, strict=True) if not keep)
        )
    return documents


def _records(chunk: Chunk, selection: Selection) -> Iterator[tuple[int, Any, bytes]]:
    """Every record as (number, a mapping or what is wrong with it, its bytes)."""
    if chunk.kind == "rows":
        import pyarrow

        with pyarrow.ipc.open_stream(chunk.data) as reader:
            rows = reader.read_all()
        try:
            for number, row in enumerate(rows.to_pylist(), start=chunk.first):
                yield number, row, b""
        except (ValueError, ArithmeticError):  # strings are not checked before, nor dates: find out which row
            for number in range(len(rows)):
                try:
                    yield chunk.first + number, rows.slice(number, 1).to_pylist()[0], b""
                except UnicodeDecodeError as error:
                    yield chunk.first + number, _BadRecord(f"not UTF-8 ({error.reason}); mend the row"), b""
                except (ValueError, ArithmeticError) as error:
                    problem = _BadRecord(f"a value that Python does not have ({error}); mend or drop the row")
                    yield chunk.first + number, problem, b""
        return
    if chunk.kind == "text":
        try:
            if len(selection.keys) != 1:
                raise _BadRecord("a text file has no keys; give one --json-keys, or JSON lines")
            yield 0, {selection.keys[0]: _decode(chunk.data, "file", has_mark=True)}, b""
        except _BadRecord as bad:
            yield 0, bad, b""  # the whole file: too much to repeat
        return
    spellings = [_KeySpellings(key) for key in selection.keys]
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first):
        if not line or line.isspace():
            continue
        try:
            record = orjson.loads(line)
            if isinstance(record, dict) and all(key.count_in(line) <= 1 for key in spellings):
                yield number, record, line
                continue
        except ValueError:
            pass
        # Rare lines take the slow way, which alone decides what is right and words what is wrong.
        try:
            text = _decode(line, "line", has_mark=number == 1)
            yield number, _load_json(text, selection.keys, number == 1), line
        except _BadRecord as bad:
            yield number, bad, line


class _KeySpellings:
    """How JSON can spell a key: each character may be escaped, and a key that is there twice hides a text."""

    def __init__(self, key: str) -> None:
        self.plain = f'"{key}"'.encode(errors="surrogatepass")
        # Letters and digits have but one escape, which begins so. Other keys take the slower search.
        self._is_simple = key.isascii() and key.replace("_", "a").replace("-", "a").isalnum()
        self._any = re.compile(b'"' + b"".join(map(_spellings, key)) + b'"')

    def is_counted_in(self, data: bytes) -> bool:
        """Whether counting ``plain`` finds every spelling in ``data``."""
        return self._is_simple and b"\\u00" not in data

    def count_in(self, line: bytes) -> int:
        if self.is_counted_in(line):
            return line.count(self.plain)
        return len(self._any.findall(line))


def _spellings(character: str) -> bytes:
    """A pattern for all ways to write a character inside a JSON string."""
    units = character.encode("utf-16-be", errors="surrogatepass").hex()
    escaped = "".join(rf"\\u(?i:{units[start : start + 4]})" for start in range(0, len(units), 4)).encode()
    ways = [re.escape(character.encode(errors="surrogatepass")), escaped]
    if short := {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}.get(
        character
    ):
        ways.append(re.escape(b"\\" + short.encode()))
    return b"(?:" + b"|".join(ways) + b")"


def _decode(data: bytes, what: str, has_mark: bool) -> str:
    if has_mark and data.startswith(b"\xef\xbb\xbf"):  # the byte-order mark that some editors put first
        data = data[3:]
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _BadRecord(
            f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start} of the {what}); "
            "convert the file, for example with iconv"
        ) from None


def _load_json(text: str, keys: tuple[str, ...], is_first: bool) -> dict[str, Any]:
    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for key in keys:
            if names.count(key) > 1:
                raise ValueError(f"the key {key!r} is there {names.count(key)} times")
        return dict(pairs)

    try:
        record = json.loads(text, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        hint = "mend or drop the line"
        if is_first and text.lstrip()[:1] in ("[", "{"):
            hint += "; a file that is one JSON document has to become one object per line (jq -c '.[]')"
        raise _BadRecord(f"not valid JSON ({error}); {hint}") from None
    if not isinstance(record, dict):
        raise _BadRecord(
            f"{_kind(record)}, not an object; each line has to be one, "
            'as {"text": "..."} (for one JSON array: jq -c \'.[]\')'
        )
    return record


def _document(record: dict[str, Any], selection: Selection) -> tuple[list[str], str | None]:
    subset = _subset(record, selection)
    texts = []
    for key in selection.keys:
        if key not in record:
            raise _BadRecord(f"no key {key!r}; there is {_some(list(record))}: choose with --json-keys")
        value = record[key]
        if not isinstance(value, str):
            raise _BadRecord(
                f"the value of {key!r} is {_kind(value)}, not a string; choose another key or mend the record"
            )
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise _BadRecord(
                    f"the value of {key!r} has half a surrogate pair (\\ud800 to \\udfff), which is no "
                    "character; mend or drop the line"
                ) from None
        texts.append(value)
    return texts, subset


def _subset(record: dict[str, Any], selection: Selection) -> str | None:
    if selection.subset_key is None:
        return None
    value: Any = record
    for part in selection.subset_key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, str) and value.isprintable():
        return value
    if selection.keep or selection.drop:
        raise _BadRecord(
            f"no name of a subset under {selection.subset_key!r}, so it can be neither kept nor dropped; "
            "choose with --subset-key"
        )
    return None


def _wanted(subset: str | None, selection: Selection) -> bool:
    return (not selection.keep or subset in selection.keep) and subset not in selection.drop


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number", bytes: "bytes without an encoding"}
    return names.get(type(value), f"a {type(value).__name__}")  # tables hold more than JSON


def _some(keys: list[str]) -> str:
    if not keys:
        return "no key at all"
    return ", ".join(repr(key) for key in keys[:8]) + (", ..." if len(keys) > 8 else "")


def read_texts(inputs: Sequence[str], key: str = "text") -> Iterator[str]:
    """Every text of the inputs, in order, one at a time.

    Raises:
        UserError: as :func:`file_sources` and :class:`SourceReader`, or a record is bad.
    """
    selection = Selection((key,))
    for source in file_sources(inputs):
        for chunk in SourceReader(source, selection.columns):
            documents = parse_chunk(chunk, selection)
            if documents.rejected:
                raise UserError(documents.rejected[0].message)
            yield from documents.texts[0]
