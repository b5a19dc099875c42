"""Reading raw text: every format gives the same documents, every fault names its place."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_lpa.errors import UserError
from megatron_lpa.preparation import readers
from megatron_lpa.preparation.documents import Selection, parse_chunk, read_texts
from megatron_lpa.preparation.hub_datasets import dataset_source
from megatron_lpa.preparation.readers import SourceReader
from megatron_lpa.preparation.sources import file_sources, resolve_inputs, shard_of

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


@pytest.mark.parametrize("chunk_bytes", [1, 100, 10_000])
@pytest.mark.parametrize("name", ["a.jsonl", "c.jsonl.gz", "f.jsonl.zst", "h.jsonl"])
def test_chunks_end_with_lines_and_any_number_of_lines_can_be_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk_bytes: int
) -> None:
    texts = [f"{i} " + "x" * (i * 37 % 300) for i in range(300)]
    (tmp_path / name).write_bytes(FORMATS[name](lines(texts)))
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(readers, "_READ_BYTES", 64)
    source = file_sources([str(tmp_path / name)])[0]
    for skip in (0, 1, 2, 150, 299, 300):
        reader = SourceReader(source, ("text",), skip)
        found, number = [], skip + 1
        for chunk in reader:
            assert chunk.first == number
            number += chunk.count
            found += parse_chunk(chunk, Selection()).texts[0]
        assert found == texts[skip:]
        assert reader.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n  \n{"text": 1}\n\n')
    (chunk,) = SourceReader(file_sources([str(path)])[0], ("text",))
    documents = parse_chunk(chunk, Selection())
    assert documents.texts == [["a"]]
    assert [rejection.number for rejection in documents.rejected] == [4]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert list(read_texts([str(tmp_path / "a.txt")])) == ["one\n\ntwo\n"]
    (chunk,) = SourceReader(file_sources([str(tmp_path / "a.txt")])[0], ("text",))
    (rejection,) = parse_chunk(chunk, Selection(("text", "title"))).rejected
    assert "a.txt: a text file has no keys" in rejection.message


def parquet_of(path: Path, columns: dict[str, list[Any]], row_group_size: int = 7) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def test_parquet_and_datasets_give_the_rows_of_the_table(tmp_path: Path) -> None:
    texts = [*TEXTS, *(f"row {i}" for i in range(2500))]
    meta = [{"pile_set_name": f"set {i % 3}"} for i in range(len(texts))]
    other = list(range(len(texts)))
    path = parquet_of(tmp_path / "a.parquet", {"text": texts, "other": other, "meta": meta}, 1700)
    assert list(read_texts([str(path)])) == texts
    selection = Selection(subset_key="meta.pile_set_name", drop=("set 1",))
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": texts, "meta": meta}).save_to_disk(str(saved))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts, "meta": meta})}).save_to_disk(
        str(tmp_path / "splits")
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"text": t, "meta": m}) + "\n" for t, m in zip(texts, meta, strict=True))
    )
    sources = [file_sources([str(path)])[0]]
    sources += [dataset_source(str(tmp_path / name), None, "train") for name in ("saved", "splits", "folder")]
    for source in sources:
        for skip in (0, 3, 1000, 2000):
            found: list[str] = []
            dropped, number = 0, skip + 1
            for chunk in SourceReader(source, selection.columns, skip):
                assert chunk.kind == "rows" and chunk.first == number
                number += chunk.count
                documents = parse_chunk(chunk, selection)
                found += documents.texts[0]
                dropped += documents.dropped["set 1"]
                assert set(documents.subsets) == {"set 0", "set 2"} and not documents.rejected
            assert found == [text for i, text in enumerate(texts) if i >= skip and i % 3 != 1]
            assert dropped == len(texts) - skip - len(found)


def test_rows_without_text_and_damaged_tables_are_named(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "a.parquet", {"text": ["a", None, "b"]})
    with pytest.raises(UserError, match=r"a\.parquet:2: the value of 'text' is null"):
        list(read_texts([str(path)]))
    with pytest.raises(UserError, match=r"a\.parquet:1: no key 'body'; there is no key at all"):
        list(read_texts([str(path)], "body"))
    data = path.read_bytes()
    for damaged in (b"", data[:-9], b"text" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file that can be read"):
            list(read_texts([str(path)]))
    with pytest.raises(UserError, match=r"dataset '.*nowhere/at/all', split 'train': .*check the name"):
        list(SourceReader(dataset_source(str(tmp_path / "nowhere/at/all"), None, "train"), ("text",)))


def test_shards_are_neighbours_and_together_everything() -> None:
    for count in range(1, 12):
        for shards in range(1, count + 1):
            parts = [shard_of(list(range(count)), i, shards) for i in range(shards)]
            assert [item for part in parts for item in part] == list(range(count)) and all(parts)
    for shard, shards, message in (
        (3, 3, "count from 0"),
        (0, 9, "only 4 input files"),
        (0, 0, "count from"),
    ):
        with pytest.raises(UserError, match=message):
            shard_of([1, 2, 3, 4], shard, shards)


def test_folders_and_globs_are_sorted_and_inputs_keep_their_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.jsonl.gz", "ignored.md", ".hidden.jsonl", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("tokenizer.json", "d_text_document.json", "d_text_document.idx", "d.rejected.jsonl"):
        (tmp_path / name).write_bytes(b"")  # what our own tools write is no text
    (tmp_path / "B2.JSONL").write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in resolve_inputs([str(tmp_path)])] == [
        "B2.JSONL",
        "a.txt",
        "b.jsonl",
        "sub/c.jsonl.gz",
    ]
    found = resolve_inputs([str(tmp_path / "sub"), str(tmp_path / "b*.jsonl"), str(tmp_path / "a.txt")])
    assert [p.name for p in found] == ["c.jsonl.gz", "b.jsonl", "a.txt"]


def test_inputs_that_cannot_be_meant(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "a.csv").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        (["none.jsonl"], r"none\.jsonl: no such file"),
        (["*.txt"], r"\*\.txt: no such file, and no file matches"),
        (["a.csv"], r"a\.csv: unknown ending; known: \.jsonl"),
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
        (b'{"body": "a", "id": 1}', r"bad\.jsonl:3: no key 'text'; there is 'body', 'id'.*--json-keys"),
        (b'{"text": null}', r"bad\.jsonl:3: the value of 'text' is null, not a string"),
        (b'{"text": ["a"]}', r"bad\.jsonl:3: the value of 'text' is a list"),
        (b'{"text": 3.5}', r"bad\.jsonl:3: the value of 'text' is a number"),
        (b'{"text": "caf\xe9"}', r"bad\.jsonl:3: not UTF-8 \(byte 0xe9 at offset 13 of the line\)"),
        (b'{"text": "\\ud83d"}', r"bad\.jsonl:3: the value of 'text' has half a surrogate pair"),
        (b'{"text": "a", "text": "b"}', r"bad\.jsonl:3: not valid JSON \(the key 'text' is there 2 times\)"),
        (b"\0" * 50, r"bad\.jsonl:3: not valid JSON"),
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
        list(read_texts([str(tmp_path / name)]))


def test_a_few_bytes_that_expand_to_very_much_do_not_fill_the_memory(tmp_path: Path) -> None:
    text = "a" * 200_000_000
    data = json.dumps({"text": text}).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data, 1))
    for block in readers._gzip_blocks(iter([(tmp_path / "a.jsonl.gz").read_bytes()])):
        assert len(block) <= readers.CHUNK_BYTES
    assert list(read_texts([str(tmp_path / "a.jsonl.gz")])) == [text]


def test_a_line_longer_than_any_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 50_000)
    monkeypatch.setattr(readers, "_READ_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines(["x" * 49_000, "x" * 60_000]))
    with pytest.raises(UserError, match=r"a\.jsonl: a line is longer than 50000 bytes"):
        list(read_texts([str(tmp_path / "a.jsonl")]))
    (tmp_path / "a.txt").write_bytes(b"x" * 50_001)
    with pytest.raises(UserError, match=r"a\.txt: 50001 bytes, and a text file is one document of at most"):
        list(read_texts([str(tmp_path / "a.txt")]))


def test_subsets_are_kept_or_dropped_and_a_record_without_one_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": name, "meta": {"pile_set_name": name}} for name in ("A", "B", "A", "C")]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"text": "none"}\n')
    (chunk,) = SourceReader(file_sources([str(path)])[0], ("text",))
    key = "meta.pile_set_name"
    for selection, texts, dropped, bad in (
        (Selection(), ["A", "B", "A", "C", "none"], {}, 0),
        (Selection(subset_key=key), ["A", "B", "A", "C", "none"], {}, 0),
        (Selection(subset_key=key, keep=("A",)), ["A", "A"], {"B": 1, "C": 1}, 1),
        (Selection(subset_key=key, drop=("A", "C")), ["B"], {"A": 2, "C": 1}, 1),
    ):
        documents = parse_chunk(chunk, selection)
        assert (documents.texts[0], documents.dropped, len(documents.rejected)) == (texts, dropped, bad)
    assert parse_chunk(chunk, Selection(subset_key=key)).subsets == ["A", "B", "A", "C", None]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", lines()), ("a.txt", b"text")):
        path = tmp_path / name
        path.write_bytes(content)
        (source,) = file_sources([str(path)])
        path.write_bytes(content + b" ")  # grown since it was listed
        with pytest.raises(UserError, match=rf"{name}: changed while the run was under way"):
            list(SourceReader(source, ("text",)))
    (source,) = file_sources([str(tmp_path / "a.jsonl")])
    reader = iter(SourceReader(source, ("text",)))
    next(reader)
    with (tmp_path / "a.jsonl").open("ab") as stream:
        stream.write(b'{"text": "late"}\n')
    with pytest.raises(UserError, match="changed while"):
        list(reader)


@pytest.mark.parametrize("name", ["01.jsonl.zst.part", "a.ndjson", "b.jsonl.xz", "c.txt.gz", "d.jsonl.aria2"])
def test_a_folder_with_unfinished_or_unknown_text_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "README.md").write_bytes(b"")
    assert len(resolve_inputs([str(tmp_path)])) == 1
    assert "1 files in" in capsys.readouterr().err
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: unfinished, or text of a kind that cannot be read"):
        resolve_inputs([str(tmp_path)])
    assert len(resolve_inputs([str(tmp_path / "a.jsonl")])) == 1
