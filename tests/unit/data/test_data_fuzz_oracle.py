"""What a malformed input really holds, told by plain Python, and one run of preprocessing compared with it.

The cases are in the other ``test_data_fuzz_*.py``. Each case is made from a seed that its failure prints.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tokenizers
import zstandard

from megatron_lpa.data.preparation import encode as encode_module
from megatron_lpa.data.preparation import preprocess as preprocess_module
from megatron_lpa.data.preparation import readers
from megatron_lpa.data.preparation.preprocess import preprocess
from megatron_lpa.data.preparation.preprocess_config import PreprocessConfig
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.tokenizers.loading import load_tokenizer
from megatron_lpa.errors import UserError

CASE_SECONDS = 10  # of this process's own time, so that a busy machine does not count
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


# --- what files hold ------------------------------------------------------------------------------------------


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


# --- one run ----------------------------------------------------------------------------------------------------


class Hung(BaseException):
    """Not an ``Exception``, so that nothing takes it for bad input."""


@contextlib.contextmanager
def time_limit(seconds: float = CASE_SECONDS) -> Iterator[None]:
    """The clock of used processor time: pytest's own time limit has the other one."""

    def stop(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def in_this_process(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int,
    initialize: Any,
    arguments: Any,
    _: Any,
) -> Iterator[Any]:
    initialize(*arguments)
    yield from map(function, items)


class Bench:
    """Runs cases in this process, with one tokenizer loaded once and nothing flushed to disk."""

    def __init__(self, folder: Path, tokenizer: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.tokenizer, self.patch = folder, tokenizer, patch
        self.reference = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        loaded = load_tokenizer(str(tokenizer), "reference")
        for module in (preprocess_module, encode_module):
            patch.setattr(module, "load_tokenizer", lambda *_, **__: loaded)
        patch.setattr(preprocess_module, "ordered_map", in_this_process)
        patch.setattr(os, "fsync", lambda _: None)
        self._number = 0

    def chunk_bytes(self, chunk: int, read: int) -> None:
        """How much is read at a time, from here on."""
        self.patch.setattr(readers, "CHUNK_BYTES", chunk)
        self.patch.setattr(preprocess_module, "CHUNK_BYTES", chunk)
        self.patch.setattr(readers, "_READ_BYTES", read)
        self.patch.setattr(readers, "_ZSTD_READ_BYTES", max(read // 3, 1))

    def config(self, inputs: tuple[str, ...], **options: Any) -> PreprocessConfig:
        options = {"engine": "reference", "log_interval": 0, "on_bad_line": "skip"} | options
        return PreprocessConfig(f"{self.folder}/out/x", str(self.tokenizer), inputs, **options)

    def ids(self, text: str) -> list[int]:
        return self.reference.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def fresh(self) -> Iterator[Path]:
        """A folder for the input of one case; it and the output are gone afterwards."""
        folder = self.folder / f"in{self._number}"
        self._number += 1
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
            shutil.rmtree(self.folder / "out", ignore_errors=True)

    def check(self, case: Case) -> None:
        """One case: refused as a whole, or every record accounted for."""
        with self.fresh() as folder:
            path = folder / f"a{case.ending}"
            path.write_bytes(case.data)
            try:
                records = records_of(case)
            except Damaged:
                try:
                    with time_limit():
                        preprocess(self.config((str(path),), drop_subsets=case.drop))
                except UserError as error:
                    assert str(path) in str(error)
                    if "no document has tokens" not in str(error):
                        return
                assert case.intact is not None, "damage not found"
                records = records_of(replace(case, data=case.intact))
                shutil.rmtree(self.folder / "out", ignore_errors=True)
            try:
                self.check_records(path, records, case.drop)
            except UserError as error:
                if not (case.lenient and str(path) in str(error)):
                    raise

    def check_records(self, path: Path, records: list[Record], drop: tuple[str, ...] = ()) -> None:
        """Compares both ways of treating bad records with what the oracle says of them."""
        config = self.config((str(path),), drop_subsets=drop)
        reject_path = Path(f"{config.prefix}.rejected.jsonl")
        try:
            with time_limit():
                (manifest,) = preprocess(config).values()
        except UserError as error:
            counts = re.search(
                r"no document has tokens .* \((\d+) are empty, (\d+) dropped .*?(\d+) bad\)", str(error)
            )
            if counts is None:
                raise
            assert str(path) in str(error)
            found, empty, dropped, rejected = [], *map(int, counts.groups())
        else:
            dataset = IndexedDataset(f"{config.prefix}_text_document")
            found = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
            empty, dropped = manifest.empty_documents, manifest.dropped_documents
            rejected = manifest.rejected_documents
            assert manifest.documents == len(found)
        rejections = _rejections(reject_path)
        assert len(found) + empty + dropped + rejected == len(records), (len(found), empty, dropped, rejected)
        assert len(rejections) == rejected
        self._compare(path, records, found, rejections)
        assert dropped == sum(record.verdict == "dropped" for record in records)
        if rejections and records[0].verdict != "either":
            self._check_error(path, [entry["line"] for entry in rejections], drop)

    def _compare(
        self, path: Path, records: list[Record], found: list[list[int]], rejections: list[dict[str, Any]]
    ) -> None:
        documents, left = iter(found), {entry["line"]: entry for entry in rejections}
        for record in records:
            entry = left.pop(record.number, None)
            if record.verdict == "dropped":
                assert entry is None, entry
            elif record.verdict == "bad" or (record.verdict == "either" and entry is not None):
                assert entry is not None, f"taken for good: {record}"
                assert entry["source"] == str(path) and entry["reason"]
                assert _rejected_line(entry) == record.data
            else:
                assert entry is None, f"good, but rejected: {entry}"
                text = record.text
                if text is None:  # what the oracle's reader cannot read was written as "text": "<letters>"
                    match = re.search(rb'"text": ?"(\w*)"', record.data)
                    assert match is not None
                    text = match[1].decode()
                if text:
                    assert next(documents) == self.ids(text), record
        assert next(documents, None) is None and not left

    def _check_error(self, path: Path, lines: list[int], drop: tuple[str, ...]) -> None:
        """The first bad record is named; told to leave it out after all, the run goes on to the same files."""
        expected = self.outputs()
        shutil.rmtree(self.folder / "out")
        with pytest.raises(UserError) as caught, time_limit():
            preprocess(self.config((str(path),), on_bad_line="error", drop_subsets=drop))
        place = f"{path}:{lines[0]}: " if lines[0] else f"{path}: "
        assert str(caught.value).startswith(place)
        assert all(name.endswith(".partial") for name in self.outputs())
        with contextlib.suppress(UserError), time_limit():  # where no record at all is good
            preprocess(self.config((str(path),), drop_subsets=drop))
        assert self.outputs() == expected

    def outputs(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (self.folder / "out").iterdir()}


def _rejections(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def _rejected_line(entry: dict[str, Any]) -> bytes:
    if "record" in entry:
        return str(entry["record"]).encode()
    return base64.b64decode(entry["record_base64"])


@contextlib.contextmanager
def reproducible(seed: str, what: object) -> Iterator[None]:
    """Adds to a failure what is needed to see it again."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise AssertionError(f"seed {seed!r}: {error!r}\n{what!r:.3000}") from error


def mutated(data: bytes, chance: random.Random, start: int = 0) -> bytes:
    """``data`` with a few bytes flipped, cut, doubled, or put in, from ``start`` on."""
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at = chance.randrange(start, max(len(data), start + 1))
        width = chance.choice([1, 1, 2, 8, 50])
        kind = chance.randrange(7)
        if kind < 3 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif kind == 3:
            data = data[:at] + data[at + width :]
        elif kind == 4:
            data = data[:at] + chance.randbytes(width) + data[at:]
        elif kind == 5:
            data = data[: at + width] + data[at:]
        else:
            data = data[:at]
    return data
