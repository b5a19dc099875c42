"""What fuzzing found, fault by fault."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_lpa.errors import UserError
from megatron_lpa.preparation import readers
from megatron_lpa.preparation.documents import Selection, parse_chunk, read_texts
from megatron_lpa.preparation.ledger import Ledger, State, ledger_path
from megatron_lpa.preparation.readers import Chunk, SourceReader
from megatron_lpa.preparation.sources import file_sources


@pytest.mark.parametrize(
    "key, line",
    [
        ("text", r'{"te\u0078t": "a", "text": "b"}'),
        ("text", r'{"text": "a", "\u0074\u0065\u0078\u0074": "b"}'),
        ("a_b", r'{"a\u005Fb": "a", "a_b": "b"}'),
        ("文本", '{"文本": "a", "文本": "b"}'),
        ("文本", r'{"文本": "a", "\u6587\u672C": "b"}'),
        ("🙂", r'{"🙂": "a", "\ud83d\uDE42": "b"}'),
        ("a b\n", r'{"a b\n": "a", "a\u0020b\u000a": "b"}'),
        ('"', r'{"\"": "a", "\u0022": "b"}'),
        ("a/b", r'{"a\/b": "a", "a/b": "b"}'),
    ],
)
def test_a_key_that_is_there_twice_is_bad_however_it_is_spelled(key: str, line: str) -> None:
    """orjson takes the last of them without a word."""
    documents = parse_chunk(Chunk("x", "lines", 2, 1, line.encode()), Selection((key,)))
    assert documents.texts == [[]] and "is there 2 times" in documents.rejected[0].reason
    once = json.dumps({key: "a", "other": key}, ensure_ascii=True).encode()
    assert parse_chunk(Chunk("x", "lines", 2, 1, once), Selection((key,))).texts == [["a"]]


@pytest.mark.parametrize("short", [b"", b'{"text": "short"}\n'])
def test_a_line_without_end_is_refused_even_after_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: bytes
) -> None:
    """With a short line in the first block, all of the rest of the file was taken into memory."""
    for name, value in (("CHUNK_BYTES", 10_000), ("_READ_BYTES", 1000), ("MAX_RECORD_BYTES", 50_000)):
        monkeypatch.setattr(readers, name, value)
    path = tmp_path / "a.jsonl"
    path.write_bytes(short + b'{"text": "' + b"x" * 200_000)
    with pytest.raises(UserError, match=r"a\.jsonl: a line is longer than 50000 bytes"):
        list(SourceReader(file_sources([str(path)])[0], ("text",)))


def test_checksums_of_parquet_pages_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text number {i}" for i in range(20)]})
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(table, path, write_page_checksum=True, **options)
    assert list(read_texts([str(path)])) == table["text"].to_pylist()
    path.write_bytes(path.read_bytes().replace(b"number 7", b"number 8", 1))
    with pytest.raises(UserError, match=r"a\.parquet: .*CRC checksum"):
        list(read_texts([str(path)]))


@pytest.mark.parametrize(
    "column, reason",
    [
        (pyarrow.array([0, 2**30], pyarrow.date32()), "a value that Python does not have"),
        (pyarrow.array([0, 2**60], pyarrow.timestamp("ms")), "a value that Python does not have"),
        (pyarrow.array([b"a", b"b"]), "is bytes without an encoding, not a string"),
    ],
)
def test_values_that_only_tables_have(tmp_path: Path, column: pyarrow.Array, reason: str) -> None:
    """Dates past the year 9999 ended the worker with a traceback."""
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (chunk,) = SourceReader(file_sources([str(tmp_path / "a.parquet")])[0], ("text",))
    rejected = parse_chunk(chunk, Selection()).rejected
    assert [rejection.number for rejection in rejected] == [1, 2] and reason in rejected[1].reason


def test_a_changed_count_in_a_ledger_is_found(tmp_path: Path) -> None:
    """It is JSON of the right kinds, and would have made wrong outputs."""
    prefix, job = f"{tmp_path}/x", {"inputs": ["a"]}
    ledger = Ledger(prefix, job, 1, False)
    ledger.commit(State(ledger.state.writers, ledger.state.counts, rejected=1))
    ledger.commit(State(ledger.state.writers, ledger.state.counts, rejected=2))
    ledger.close()
    resumed = Ledger(prefix, job, 1, False)
    assert resumed.resumed and resumed.state.rejected == 2
    resumed.commit(State(ledger.state.writers, ledger.state.counts, rejected=3))
    resumed.close()
    whole = ledger_path(prefix).read_bytes()
    ledger_path(prefix).write_bytes(whole.replace(b'"rejected": [1,', b'"rejected": [0,'))
    with pytest.raises(UserError, match=r"x\.ledger\.partial:2: damaged; pass --restart"):
        Ledger(prefix, job, 1, False)
    lines = whole.splitlines(keepends=True)
    ledger_path(prefix).write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(UserError, match=r"x\.ledger\.partial:3: damaged"):
        Ledger(prefix, job, 1, False)
    ledger_path(prefix).write_bytes(whole.replace(b'"format": 2', b'"format": 1'))
    with pytest.raises(UserError, match="another version"):
        Ledger(prefix, job, 1, False)
    ledger_path(prefix).unlink()
    ledger_path(prefix).mkdir()
    with pytest.raises(UserError, match=r"x\.ledger\.partial: a folder, not a regular file"):
        Ledger(prefix, job, 1, False)
