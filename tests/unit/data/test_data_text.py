"""Readers of raw text: every format gives the same records, every fault names its place."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron_lpa.data.text import parse, read_raw, read_texts, resolve_inputs
from megatron_lpa.errors import UserError

TEXTS = [
    "plain",
    "naïve café — 日本 🙂",
    "two\nlines\r\nand a tab\t",
    "",
    "x" * 300_000,
    "line\u2028separator",
]


def lines(texts: list[str] = TEXTS, ascii_only: bool = False) -> bytes:
    return "".join(json.dumps({"text": t}, ensure_ascii=ascii_only) + "\n" for t in texts).encode()


def frames(data: bytes, size: int) -> bytes:
    """Several zstd frames, as parallel compressors write, with a skippable one between."""
    parts = [zstandard.compress(data[i : i + size]) for i in range(0, len(data), size)]
    return (b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd").join(parts)


def zstd_stream(data: bytes) -> bytes:
    """One frame that does not say how long its content is."""
    sink = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(sink, closefd=False) as writer:
        writer.write(data)
    return sink.getvalue()


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": lambda data: data,
    "b.json": lambda data: data,
    "c.jsonl.gz": gzip.compress,
    "d.jsonl.gz": lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
    "e.jsonl.zst": zstandard.compress,
    "f.jsonl.zst": lambda data: frames(data, 1000),
    "g.jsonl.zst": zstd_stream,
    "h.jsonl": lambda data: data.rstrip(b"\n"),
    "i.jsonl": lambda data: data.replace(b"}\n", b"}\r\n"),
    "j.jsonl": lambda data: b"\xef\xbb\xbf" + data,
    "k.json.zst": lambda data: zstandard.compress(data.rstrip(b"\n")),
    "l.jsonl": lambda data: lines(ascii_only=True),
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](lines()))
    assert list(read_texts([str(tmp_path / name)])) == TEXTS


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n  \n{"text": "b"}\n\n')
    assert [(record.line, parse(record, ["text"])) for record in read_raw(path)] == [(1, ["a"]), (4, ["b"])]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert list(read_texts([str(tmp_path / "a.txt")])) == ["one\n\ntwo\n"]
    with pytest.raises(UserError, match=r"a\.txt: a text file has no keys"):
        parse(next(read_raw(tmp_path / "a.txt")), ["text", "title"])


def test_folders_and_globs_are_sorted_and_inputs_keep_their_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.jsonl.gz", "ignored.md", ".hidden.jsonl", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in resolve_inputs([str(tmp_path)])] == [
        "a.txt",
        "b.jsonl",
        "sub/c.jsonl.gz",
    ]
    found = resolve_inputs([str(tmp_path / "sub"), str(tmp_path / "*.jsonl"), str(tmp_path / "a.txt")])
    assert [p.name for p in found] == ["c.jsonl.gz", "b.jsonl", "a.txt"]


def test_inputs_that_cannot_be_meant(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        (["none.jsonl"], r"none\.jsonl: no such file"),
        (["*.txt"], r"\*\.txt: no such file, and no file matches"),
        (["a.parquet"], r"a\.parquet: unknown ending; known: \.jsonl"),
        (["empty"], r"empty: no text in this folder"),
        (["a.jsonl", "*.jsonl"], r"a\.jsonl: named twice"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_inputs([str(tmp_path / name) for name in inputs])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"bad\.jsonl:3: not valid JSON"),
        (b'["a"]', r"bad\.jsonl:3: a list, not an object"),
        (b'"a"', r"bad\.jsonl:3: a string, not an object"),
        (b'{"body": "a", "id": 1}', r"bad\.jsonl:3: no key 'text'; this line has 'body', 'id'.*--json-keys"),
        (b'{"text": null}', r"bad\.jsonl:3: the value of 'text' is null, not a string"),
        (b'{"text": ["a"]}', r"bad\.jsonl:3: the value of 'text' is a list"),
        (b'{"text": 3.5}', r"bad\.jsonl:3: the value of 'text' is a number"),
        (b'{"text": "caf\xe9"}', r"bad\.jsonl:3: not UTF-8 \(byte 0xe9 at offset 13 of the line\)"),
        (b'{"text": "\\ud83d"}', r"bad\.jsonl:3: the value of 'text' has half a surrogate pair"),
        (b"[" * 100_000, r"bad\.jsonl:3: not valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=message):
        list(read_texts([str(path)]))


def test_one_json_document_instead_of_lines_says_how_to_convert(tmp_path: Path) -> None:
    for number, content in enumerate(
        ('[\n  {"text": "a"}\n]\n', '[{"text": "a"}, {"text": "b"}]\n', '{\n"text": "a"}')
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        with pytest.raises(UserError, match=r"\.json:1: .*jq -c '\.\[\]'"):
            list(read_texts([str(path)]))


@pytest.mark.parametrize("name", ["c.jsonl.gz", "e.jsonl.zst", "f.jsonl.zst", "g.jsonl.zst"])
def test_a_compressed_file_cut_short_is_never_taken_for_a_whole_one(tmp_path: Path, name: str) -> None:
    data = FORMATS[name](lines([f"text {i}" for i in range(500)]))
    path = tmp_path / name
    for length in {len(data) - 1, len(data) - 5, len(data) // 2, 20}:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=rf"{name}: the compressed file is (cut short|damaged)"):
            list(read_texts([str(path)]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_compressed_at_all(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(lines())
    with pytest.raises(UserError, match=rf"{name}: the compressed file is damaged"):
        list(read_texts([str(tmp_path / name)]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_of_no_bytes_is_cut_short(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name}: the compressed file is cut short"):
        list(read_raw(tmp_path / name))
