"""Malformed Parquet files, and folders with odd contents."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.fuzz_bench import Bench, mutated, reproducible, time_limit
from support.record_oracle import Record

from megatron_lpa.errors import UserError
from megatron_lpa.preparation.preprocess import preprocess
from megatron_lpa.preparation.sources import resolve_inputs

pytestmark = pytest.mark.timeout(300)

CASES = 50


@pytest.fixture
def bench(tmp_path: Path, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, bpe_folder, monkeypatch)


def invalid_strings(values: list[bytes | None]) -> pyarrow.Array:
    """A column of strings that are not all UTF-8, as careless writers leave."""
    binary = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(binary), binary.buffers())


STRINGS = ["a", "two words", "", "é日本🙂", "x" * 300, "a\x00b\n", None]
COLUMNS: dict[str, Callable[[list[Any]], pyarrow.Array]] = {
    "string": lambda values: pyarrow.array(values, pyarrow.string()),
    "large_string": lambda values: pyarrow.array(values, pyarrow.large_string()),
    "string_view": lambda values: pyarrow.array(values, pyarrow.string_view()),
    "dictionary": lambda values: pyarrow.array(values, pyarrow.string()).dictionary_encode(),
    "invalid": lambda values: invalid_strings([v and v.encode() + b"\xe9" * (len(v) % 2) for v in values]),
    "binary": lambda values: pyarrow.array([v and v.encode() for v in values], pyarrow.binary()),
    "null": lambda values: pyarrow.nulls(len(values)),
    "int": lambda values: pyarrow.array([None if v is None else len(v) for v in values], pyarrow.int16()),
    "float": lambda values: pyarrow.array([float("nan") for _ in values]),
    "bool": lambda values: pyarrow.array([v == "a" for v in values]),
    "list": lambda values: pyarrow.array([[v] for v in values], pyarrow.list_(pyarrow.string())),
    "struct": lambda values: pyarrow.array([{"text": v} for v in values]),
    "map": lambda values: pyarrow.array(
        [[("a", v)] for v in values], pyarrow.map_(pyarrow.string(), pyarrow.string())
    ),
    "date": lambda values: pyarrow.array([2**30 for _ in values], pyarrow.date32()),
    "timestamp": lambda values: pyarrow.array([2**60 for _ in values], pyarrow.timestamp("ms")),
    "zone": lambda values: pyarrow.array([0 for _ in values], pyarrow.timestamp("us", tz="No/Where")),
    "decimal": lambda values: pyarrow.array([1 for _ in values]).cast(pyarrow.decimal128(30, 2)),
    "time": lambda values: pyarrow.array([datetime.time(1) for _ in values]),
}
TEXT_COLUMNS = ("string", "large_string", "string_view", "dictionary")


def table_file(chance: random.Random, kind: str) -> tuple[bytes, list[Record]]:
    rows = chance.choice([0, 1, 5, 40, 1500]) if kind == "string" else chance.choice([0, 1, 5, 40])
    values = [chance.choice(STRINGS) for _ in range(rows)]
    columns = {"text": COLUMNS[kind](values)}
    if chance.random() < 0.4:
        columns = {
            "other": pyarrow.array(range(rows), pyarrow.int64()),
            **columns,
            "text.x": pyarrow.nulls(rows),
        }
    name = chance.choice(["text", "text", "text", "body"])
    table = pyarrow.table({name if key == "text" else key: column for key, column in columns.items()})
    sink = io.BytesIO()
    parquet.write_table(
        table,
        sink,
        row_group_size=chance.choice([1, 7, 1 << 20]),
        compression=chance.choice(["none", "snappy", "zstd", "gzip"]),
        use_dictionary=chance.random() < 0.5,
        data_page_size=chance.choice([10, 1 << 20]),
        write_page_checksum=chance.random() < 0.3,
    )
    records = []
    for number, value in enumerate(values, start=1):
        good = name == "text" and value is not None and kind in TEXT_COLUMNS
        good = good or (name == "text" and kind == "invalid" and value is not None and len(value) % 2 == 0)
        records.append(Record(number, "good", value) if good else Record(number, "bad"))
    return sink.getvalue(), records


@pytest.mark.parametrize("kind", COLUMNS)
def test_tables_of_every_type(bench: Bench, kind: str) -> None:
    for number in range(12):
        chance = random.Random(f"{kind}-{number}")
        data, records = table_file(chance, kind)
        bench.chunk_bytes(chance.choice([1, 100, 1 << 20]), 1000)
        with bench.fresh() as folder, reproducible(f"{kind}-{number}", records[:9]):
            path = folder / "a.parquet"
            path.write_bytes(data)
            bench.check_records(path, records)


def test_a_column_that_is_there_twice_is_refused(bench: Bench) -> None:
    """Of two columns of one name a row has but the last."""
    with bench.fresh() as folder:
        table = pyarrow.Table.from_arrays(
            [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]
        )
        parquet.write_table(table, folder / "a.parquet")
        with pytest.raises(UserError, match=r"a\.parquet: the column 'text' is there 2 times"):
            preprocess(bench.config((f"{folder}/a.parquet",)))


@pytest.mark.parametrize("block", range(5))
def test_damaged_tables(bench: Bench, block: int) -> None:
    """
    Where pages have no checksum, a flipped bit can be another character of the same text: pyarrow's one-shot
    reader then decides what the rows are. Where they have one, it must be found.
    """
    for number in range(CASES):
        chance = random.Random(f"damage-{block}-{number}")
        data, _ = table_file(chance, chance.choice(["string", "string", "dictionary", "invalid", "int"]))
        cut = chance.random() < 0.3
        data = data[: chance.randrange(len(data))] if cut else mutated(data, chance)
        with bench.fresh() as folder, reproducible(f"damage-{block}-{number}", data):
            path = folder / "a.parquet"
            path.write_bytes(data)
            try:
                records = rows_of(path)
            except Exception:  # whatever pyarrow finds
                with pytest.raises(UserError, match=re.escape(str(path))), time_limit():
                    preprocess(bench.config((str(path),)))
                continue
            try:
                bench.check_records(path, records)
            except UserError as error:  # other parts of the file than the oracle's
                assert str(path) in str(error)


def rows_of(path: Path) -> list[Record]:
    # The batches of a reader, because reading all at once passes over some faults of the headers.
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        name = [name for name in file.schema_arrow.names if name == "text"]
        table = file.read(columns=name)
    rows = table.num_rows
    column = table.column("text") if name else pyarrow.chunked_array([pyarrow.nulls(rows)])
    records = []
    for number in range(rows):
        try:
            value = column[number].as_py()
        except UnicodeDecodeError:
            value = None
        records.append(
            Record(number + 1, "good", value) if isinstance(value, str) else Record(number + 1, "bad")
        )
    return records


# --- folders
# ----------------------------------------------------------------------------------------------------

GOOD = b'{"text": "%d"}\n'
ODD_NAMES = [
    "a b.jsonl",
    " .jsonl",
    "-x.jsonl",
    "'\"$(x).jsonl",
    "*.jsonl",
    "[a].jsonl",
    "é日.jsonl",
]
ODD_NAMES += [
    "x.JSONL",
    "a.jsonl.gz.txt",
    "%s.jsonl",
    "~.json",
    "{a,b}.json",
    "\\.json",
]


def texts(bench: Bench, *inputs: str) -> list[list[int]]:
    from megatron_lpa.data.storage.indexed import IndexedDataset

    with time_limit():
        preprocess(bench.config(inputs, overwrite=True))
    dataset = IndexedDataset(f"{bench.folder}/out/x_text_document")
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def test_odd_names(bench: Bench) -> None:
    with bench.fresh() as folder:
        for number, name in enumerate(ODD_NAMES):
            (folder / name).write_bytes(GOOD % number)
            text = (GOOD % number).decode() if name.endswith(".txt") else str(number)
            with reproducible(name, name):
                assert texts(bench, str(folder / name)) == [bench.ids(text)]
        assert len(texts(bench, str(folder))) == len(ODD_NAMES)
        assert len(texts(bench, f"{folder}/")) == len(ODD_NAMES)


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("odd", ["a\nb", "\x01\x7f", "\u2028"])
def test_a_name_that_no_line_can_show_is_refused(bench: Bench, where: str, odd: str) -> None:
    """The manifest lists the texts, and its reader takes no name that could pass for a line of its own."""
    with bench.fresh() as folder:
        inner = folder / (odd if where == "folder" else "inner")
        inner.mkdir()
        text = inner / ("a.jsonl" if where == "folder" else f"{odd}.jsonl")
        text.write_bytes(GOOD % 0)
        for given in (str(folder), str(text)):
            with pytest.raises(UserError, match=r"has no place.*; rename it") as caught:
                preprocess(bench.config((given,)))
            assert str(caught.value).isprintable() and repr(str(text)) in str(caught.value)
        assert not (bench.folder / "out").exists()


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_name_that_is_not_utf8_is_refused(bench: Bench, where: str) -> None:
    """Neither the manifest nor the reject file could say where a text is from."""
    with bench.fresh() as folder:
        inner = os.path.join(os.fsencode(folder), b"\xff" if where == "folder" else b"inner")
        os.mkdir(inner)
        name = os.fsdecode(os.path.join(inner, b"a.jsonl" if where == "folder" else b"a\xff.jsonl"))
        Path(name).write_bytes(b'{"text": "a"}\n{}\n')
        for given in (str(folder), name):
            with pytest.raises(UserError, match=r"\\udcff.*a name which is not UTF-8"):
                preprocess(bench.config((given,)))


def test_folders_with_links(bench: Bench) -> None:
    """Links to folders are followed, each folder once; in a circle they end; into nothing they are
    refused."""
    with bench.fresh() as folder:
        for number, name in enumerate(("in/a", "in/deep/er", "elsewhere/b")):
            (folder / name).mkdir(parents=True)
            (folder / name / "t.jsonl").write_bytes(GOOD % number)
        (folder / "in" / "x.jsonl").mkdir()  # a folder in spite of its name
        (folder / "in" / "x.jsonl" / "t.jsonl").write_bytes(GOOD % 3)
        for name in ("loop", "a/up", "deep/er/up"):
            (folder / "in" / name).symlink_to(folder / "in")
        (folder / "in" / "z").symlink_to(folder / "elsewhere")
        (folder / "in" / "self").symlink_to("self")
        (folder / "in" / "gone").symlink_to("nowhere")  # not by its name a text
        found = [str(path.relative_to(folder)) for path in resolve_inputs([f"{folder}/in"])]
        assert found == ["in/a/t.jsonl", "in/deep/er/t.jsonl", "in/x.jsonl/t.jsonl", "in/z/b/t.jsonl"]
        assert texts(bench, f"{folder}/in") == [bench.ids(text) for text in "0132"]
        (folder / "in" / "gone.jsonl").symlink_to("nowhere")
        with pytest.raises(UserError, match=r"gone\.jsonl: a link that leads nowhere"):
            resolve_inputs([f"{folder}/in"])
        (folder / "in" / "gone.jsonl").unlink()
        (folder / "in" / "again.jsonl").symlink_to(folder / "in/a/t.jsonl")
        with pytest.raises(UserError, match="named twice"):
            resolve_inputs([f"{folder}/in"])


def test_what_cannot_be_read_is_refused(bench: Bench) -> None:
    """A closed folder or file, which root can always read, by what the system would say."""
    with bench.fresh() as folder:
        (folder / "in" / "closed").mkdir(parents=True)
        path = folder / "in" / "a.jsonl"
        path.write_bytes(b'{"text": "a"}\n')
        real_scandir, real_open = os.scandir, os.open

        def scandir(name: Any) -> Any:
            if str(name).endswith("closed"):
                raise PermissionError(13, "Permission denied", str(name))
            return real_scandir(name)

        def open_file(name: Any, *arguments: Any, **options: Any) -> Any:
            if str(name).endswith("a.jsonl"):
                raise PermissionError(13, "Permission denied", str(name))
            return real_open(name, *arguments, **options)

        with bench.patch.context() as patch:
            patch.setattr(os, "scandir", scandir)
            with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
                preprocess(bench.config((f"{folder}/in",)))
        with bench.patch.context() as patch:
            patch.setattr(os, "open", open_file)
            with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
                preprocess(bench.config((f"{folder}/in",)))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "\n",
            "\0",
            "a\0b.jsonl",
            "x" * 300,
            "/".join(["x" * 200] * 30),
            "*" * 300,
            "[",
            "**/[",
            "\udcff",
        ),
        *(
            "/dev/null",
            "/dev/zero",
            "/dev/stdin",
            "/proc/self/mem",
            "/proc/self/maps",
            "/proc/self",
            "fifo.jsonl",
        ),
        *(
            "/dev/null/x.jsonl",
            "nowhere/",
            "loop.jsonl",
            "empty",
            "empty/",
            "empty/*",
            "~nobody/x.jsonl",
        ),
        "closed.jsonl/x",
    ],
)
def test_inputs_that_are_no_text(bench: Bench, name: str) -> None:
    with bench.fresh() as folder, _in(folder):
        (folder / "empty").mkdir()
        (folder / "fifo").mkdir()
        os.mkfifo("fifo.jsonl")
        os.symlink("loop.jsonl", "loop.jsonl")
        (folder / "closed.jsonl").write_bytes(b'{"text": "a"}\n')
        with pytest.raises(UserError), time_limit():
            preprocess(bench.config((name,)))


@contextlib.contextmanager
def _in(folder: Path):  # type: ignore[no-untyped-def]
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    "options", [{"json_keys": ("k" * 250,)}, {"output_prefix": "/dev/null/x"}, {"output_prefix": "x" * 300}]
)
def test_outputs_that_cannot_be(bench: Bench, options: dict[str, Any]) -> None:
    """Names too long, and a folder that is none: refused, and nothing left behind."""
    with bench.fresh() as folder, _in(folder):
        (folder / "a.jsonl").write_bytes(b'{"text": "a"}\n')
        with pytest.raises(UserError, match=r"too long|Not a directory"):
            preprocess(dataclasses.replace(bench.config(("a.jsonl",)), **options))
        assert not (bench.folder / "out").exists() or not bench.outputs()
        assert os.listdir() == ["a.jsonl"]
