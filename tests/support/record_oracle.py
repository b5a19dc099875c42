"""What a malformed input file really holds, told by plain Python."""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zstandard

_BLANKS = b" \t\n\r\x0b\x0c"


class Damaged(Exception):
    """The oracle's word for a file that cannot be unpacked."""


@dataclass(frozen=True)
class Record:
    """One record as the oracle sees it.

    Args:
        number: line or row from 1; 0 for a text file.
        verdict: ``either``: a limit of a JSON reader decides, both ways are right.
        text: of a good one; ``None`` where the oracle cannot tell.
        data: the line.
    """

    number: int
    verdict: Literal["good", "bad", "dropped", "either"]
    text: str | None = None
    data: bytes = b""


@dataclass(frozen=True)
class Case:
    """One input file.

    Args:
        ending: of its name.
        data: its bytes.
        lenient: refusing the file is right even where the oracle can read it.
        drop: subsets to leave out.
        intact: the bytes before the damage. Reading these is right even where the oracle refuses the others:
            libzstd does not compare the announced length of a frame that ends with an empty block.
    """

    ending: str
    data: bytes
    lenient: bool = False
    drop: tuple[str, ...] = ()
    intact: bytes | None = None


def line_records(data: bytes, drop: tuple[str, ...] = (), key: str = "text") -> list[Record]:
    lines = data.split(b"\n")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip(_BLANKS)]
    return [_line_record(number, line, drop, key) for number, line in numbered]


def _line_record(number: int, line: bytes, drop: tuple[str, ...], key: str) -> Record:
    text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    twice = False

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        twice = twice or [name for name, _ in found].count(key) > 1
        return dict(found)

    try:
        record = json.loads(text.decode(), object_pairs_hook=pairs)
    except UnicodeDecodeError:
        return Record(number, "bad", None, line)
    except RecursionError:
        return Record(number, "either", None, line)
    except json.JSONDecodeError:
        return Record(number, "bad", None, line)
    except ValueError:  # more digits than int() takes
        return Record(number, "either", None, line)
    value = record.get(key) if isinstance(record, dict) else None
    if twice or not isinstance(value, str) or not _is_text(value):
        return Record(number, "bad", None, line)
    if drop:
        meta = record.get("meta")
        name = meta.get("pile_set_name") if isinstance(meta, dict) else None
        if not isinstance(name, str) or not name.isprintable():
            return Record(number, "bad", None, line)
        if name in drop:
            return Record(number, "dropped", None, line)
    return Record(number, "good", value, line)


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def text_records(data: bytes) -> list[Record]:
    with contextlib.suppress(UnicodeDecodeError):
        return [Record(0, "good", data.removeprefix(b"\xef\xbb\xbf").decode())]
    return [Record(0, "bad")]


def gunzip(data: bytes) -> bytes:
    if not data:
        raise Damaged("no member at all")
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, OSError) as error:
        raise Damaged(str(error)) from error


def unzstd(data: bytes) -> bytes:
    """Walks over the frames by their headers and unpacks each in one go."""
    if not data:
        raise Damaged("no frame at all")
    parts, start = [], 0
    while start < len(data):
        stop = _frame_end(data, start)
        if data[start + 1 : start + 4] != b"\x2a\x4d\x18":
            frame = data[start:stop]
            try:
                if zstandard.frame_content_size(frame) > 1 << 26:
                    raise Damaged("announces more than any case holds")
                parts.append(zstandard.ZstdDecompressor().decompress(frame, max_output_size=1 << 26))
            except zstandard.ZstdError as error:
                raise Damaged(str(error)) from error
        start = stop
    return b"".join(parts)


def _frame_end(data: bytes, start: int) -> int:
    try:
        (magic,) = struct.unpack_from("<I", data, start)
        if magic & 0xFFFFFFF0 == 0x184D2A50:
            end = start + 8 + int(struct.unpack_from("<I", data, start + 4)[0])
        elif magic != 0xFD2FB528:
            raise Damaged(f"magic {magic:x}")
        else:
            descriptor = data[start + 4]
            single = descriptor >> 5 & 1
            content = (single, 2, 4, 8)[descriptor >> 6]
            end = start + 5 + (not single) + (0, 1, 2, 4)[descriptor & 3] + content
            last = False
            while not last:
                header = int.from_bytes(data[end : end + 3], "little") if end + 3 <= len(data) else 6
                last, kind = bool(header & 1), header >> 1 & 3
                if kind == 3:
                    raise Damaged("block of an unknown kind, or none")
                end += 3 + (1 if kind == 1 else header >> 3)
            end += 4 * (descriptor >> 2 & 1)
    except (struct.error, IndexError) as error:
        raise Damaged("cut inside a header") from error
    if end > len(data):
        raise Damaged("cut inside a frame")
    return end


def records_of(case: Case) -> list[Record]:
    """
    Raises:
        Damaged: the file cannot be unpacked.
    """
    if case.ending == ".txt":
        return text_records(case.data)
    unpack: Callable[[bytes], bytes] = {".gz": gunzip, ".zst": unzstd}.get(Path(case.ending).suffix, bytes)
    return line_records(unpack(case.data), case.drop)
