"""Reading sources in chunks of whole records, without looking inside the records.

This is the part of reading that has to happen in order, in one process: taking bytes from disk, hashing
and decompressing them, and finding the ends of lines. What a record means is ``records.py``'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any, Literal

import zstandard

from megatron_lpa.data.storage.reading import stream_of
from megatron_lpa.errors import UserError
from megatron_lpa.files import unreadable
from megatron_lpa.preparation.sources import Source

CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 28  # a longer line is hardly text, and would not fit the memory promised
_READ_BYTES = 1 << 18  # compressed bytes at a time; text expands to a few times that
_ZSTD_READ_BYTES = 1 << 16
_ROWS = 1000  # rows of a table at a time
_ZSTD_MAX_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` needs


@dataclass(frozen=True)
class Chunk:
    """Neighbouring records of one source.

    Args:
        source: name of the source, for messages.
        kind: ``lines``: ``data`` is JSON lines; ``text``: one document; ``rows``: an Arrow IPC stream.
        first: number of the first line or row, from 1.
        count: lines or rows in ``data``, blank lines included.
        data: the bytes.
    """

    source: str
    kind: Literal["lines", "text", "rows"]
    first: int
    count: int
    data: bytes


class SourceReader:
    """Iterates over the chunks of one source, once.

    Args:
        source: what to read.
        columns: top-level keys of interest; other columns of a table are not read.
        skip_records: lines or rows to pass over at the start.

    Attributes:
        sha256: hex digest of the file's bytes, once everything was read; ``None`` for a dataset.

    Raises:
        UserError: while iterating: the source cannot be read, is damaged or cut short, or lacks a column.
        TryAgain: while iterating: the disk does not give it.
    """

    def __init__(self, source: Source, columns: tuple[str, ...], skip_records: int = 0) -> None:
        self.source = source
        self.sha256: str | None = None
        self._columns = columns
        self._skip = skip_records
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[Chunk]:
        name = self.source.name
        try:
            if self.source.kind == "dataset":
                yield from self._dataset_chunks()
                return
            if self.source.kind == "parquet":
                yield from self._parquet_chunks()
            elif self.source.kind == "text":
                yield from self._text_chunk()
            else:
                yield from self._line_chunks()
            self.sha256 = self._hash.hexdigest()
        except EOFError as error:
            raise UserError(f"{name}: the compressed file is cut short; copy or download it again") from error
        except (zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{name}: the compressed file is damaged ({error}); download it again") from error
        except OSError as error:
            raise unreadable(name, error) from error

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The file, which must be the one that was looked at before, and stay so to its end.

        Raises:
            UserError: it changed.
        """
        with stream_of(self.source.path) as stream:
            self._check_unchanged(stream)
            yield stream
            self._check_unchanged(stream)

    def _check_unchanged(self, stream: IO[bytes]) -> None:
        status = os.fstat(stream.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.source.size_bytes, self.source.mtime_ns):
            raise UserError(
                f"{self.source.name}: changed while the run was under way; start again when it is complete"
            )

    def _raw_blocks(self, stream: IO[bytes]) -> Iterator[bytes]:
        while data := stream.read(_READ_BYTES):
            self._hash.update(data)
            yield data

    def _text_chunk(self) -> Iterator[Chunk]:
        if self.source.size_bytes > MAX_RECORD_BYTES:
            raise UserError(
                f"{self.source.name}: {self.source.size_bytes} bytes, and a text file is one document of at "
                f"most {MAX_RECORD_BYTES}; split it, or make JSON lines of it"
            )
        with self._opened() as stream:
            data = b"".join(self._raw_blocks(stream))
        if not self._skip:
            yield Chunk(self.source.name, "text", 1, 1, data)

    def _line_chunks(self) -> Iterator[Chunk]:
        line = 1
        with self._opened() as stream:
            blocks: Iterator[bytes] = self._raw_blocks(stream)
            ending = self.source.name.lower()
            if ending.endswith(".gz"):
                blocks = _gzip_blocks(blocks)
            elif ending.endswith(".zst"):
                blocks = _zstd_blocks(blocks)
            for data in _whole_lines(blocks, self.source.name):
                count = data.count(b"\n") + (not data.endswith(b"\n"))
                chunk = Chunk(self.source.name, "lines", line, count, data)
                line += count
                if line - 1 <= self._skip:
                    continue
                yield _without_lines(chunk, self._skip - chunk.first + 1)

    def _parquet_chunks(self) -> Iterator[Chunk]:
        import pyarrow
        from pyarrow import parquet

        try:
            with self._opened() as stream:
                for _ in self._raw_blocks(stream):
                    pass
                # Few writers put checksums into their pages; without one a flipped bit is just another text.
                file = parquet.ParquetFile(stream, page_checksum_verification=True)
                known = file.schema_arrow.names
                columns = [name for name in self._columns if name in known]
                for name in columns:
                    if known.count(name) > 1:
                        raise UserError(
                            f"{self.source.name}: the column {name!r} is there {known.count(name)} times; "
                            "rename all but one"
                        )
                yield from self._row_chunks(file.iter_batches(batch_size=_ROWS, columns=columns))
        except pyarrow.ArrowException as error:
            raise UserError(
                f"{self.source.name}: not a Parquet file that can be read ({_first_line(error)}); "
                "copy or download it again"
            ) from error

    def _dataset_chunks(self) -> Iterator[Chunk]:
        from megatron_lpa.preparation.hub_datasets import record_batches

        yield from self._row_chunks(record_batches(self.source, self._columns, _ROWS))

    def _row_chunks(self, batches: Iterator[Any]) -> Iterator[Chunk]:
        import pyarrow

        row = 1
        for batch in batches:
            first, row = row, row + batch.num_rows
            passed_over = min(max(self._skip - first + 1, 0), batch.num_rows)
            batch = batch.slice(passed_over)
            if not batch.num_rows:
                continue
            for start in range(0, batch.num_rows, step := _rows_per_chunk(batch)):
                part = batch.slice(start, step)
                number = first + passed_over + start
                if part.nbytes > MAX_RECORD_BYTES:
                    raise UserError(
                        f"{self.source.name}:{number}: a row of more than {MAX_RECORD_BYTES} bytes; split it"
                    )
                sink = io.BytesIO()
                with pyarrow.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
                yield Chunk(self.source.name, "rows", number, part.num_rows, sink.getvalue())


def _rows_per_chunk(batch: Any) -> int:
    return max(1, min(batch.num_rows, batch.num_rows * CHUNK_BYTES // max(batch.nbytes, 1)))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _gzip_blocks(raw: Iterator[bytes]) -> Iterator[bytes]:
    """Decompressed blocks of all members; zeros between or after them are padding."""
    member, seen = None, False
    for data in raw:
        while data:
            if member is None:
                if seen and not (data := data.lstrip(b"\0")):
                    break
                member, seen = zlib.decompressobj(wbits=31), True
            # Bounded, so that a few bytes cannot expand to all memory at once; a full block may leave more
            # inside the decompressor even when it has taken all its input.
            block = member.decompress(data, CHUNK_BYTES)
            while block:
                yield block
                full, data = len(block) == CHUNK_BYTES, member.unconsumed_tail
                block = member.decompress(data, CHUNK_BYTES) if full and not member.eof else b""
            data = member.unconsumed_tail
            if member.eof:
                data, member = member.unused_data, None
    if member is not None or not seen:
        raise EOFError


def _zstd_blocks(raw: Iterator[bytes]) -> Iterator[bytes]:
    """Decompressed blocks of all frames. zstandard's own stream reader takes a cut-off frame for the end."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    frame, seen = None, False
    # In small pieces, because what a piece expands to comes at once.
    for data in (part for block in raw for part in _pieces(block, _ZSTD_READ_BYTES)):
        while data:
            frame, seen = frame or decompressor.decompressobj(), True
            if block := frame.decompress(data):
                yield block
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None or not seen:
        raise EOFError


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def _whole_lines(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Joins and cuts blocks so that each ends with a line; only the last may lack the newline."""
    pending: list[bytes] = []
    size_bytes = 0
    last_end: tuple[int, int] | None = None  # of the last line that is whole: a block, and where in it
    for block in blocks:
        if end := block.rfind(b"\n") + 1:
            last_end = len(pending), end
        pending.append(block)
        size_bytes += len(block)
        if size_bytes < CHUNK_BYTES:
            continue
        if last_end is not None:
            # Not always in this block: a short line may have come long before, with a long one after it.
            number, end = last_end
            yield b"".join([*pending[:number], pending[number][:end]])
            pending = [pending[number][end:], *pending[number + 1 :]]
            size_bytes, last_end = sum(map(len, pending)), None
        if size_bytes > MAX_RECORD_BYTES:
            raise UserError(
                f"{name}: a line is longer than {MAX_RECORD_BYTES} bytes; each line has to be one JSON "
                "object (for one JSON array: jq -c '.[]')"
            )
    if rest := b"".join(pending):
        yield rest


def _without_lines(chunk: Chunk, lines: int) -> Chunk:
    """The chunk without its first ``lines`` lines."""
    if lines <= 0:
        return chunk
    start = 0
    for _ in range(lines):
        start = chunk.data.index(b"\n", start) + 1
    return replace(chunk, first=chunk.first + lines, count=chunk.count - lines, data=chunk.data[start:])
