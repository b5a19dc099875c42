"""Malformed text, plain and compressed: refused as a whole, or no record lost and no bad one kept."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from support.fuzz_bench import Bench, mutated, reproducible
from support.record_oracle import Case

pytestmark = pytest.mark.timeout(300)

CASES = 50  # in one test


@pytest.fixture
def bench(tmp_path: Path, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, bpe_folder, monkeypatch)


def chance_text(chance: random.Random) -> str:
    alphabet = chance.choice(
        ["abc xyz", "naïve ß", "日本🙂 e\u0301", 'q"\\/\b\f\n\r\t', "\x00\x7f\u2028\u2029\x85\ufeff "]
    )
    return "".join(chance.choice(alphabet) for _ in range(chance.choice([0, 1, 5, 30])))


def chance_record(chance: random.Random) -> dict[str, object]:
    record: dict[str, object] = {"text": chance_text(chance)}
    if chance.random() < 0.3:
        record["meta"] = {"pile_set_name": chance.choice(["A", "B", "é"])}
    if chance.random() < 0.2:
        record["id"] = chance.choice([0, -1, 1.5, None, True, [], {"text": "inside"}, 10**30])
    return record


def good_line(chance: random.Random) -> bytes:
    record = chance_record(chance)
    return json.dumps(record, ensure_ascii=chance.random() < 0.5).encode()


def fixed(*lines: bytes) -> Callable[[random.Random], bytes]:
    return lambda chance: chance.choice(lines)


ODD_LINES: dict[str, Callable[[random.Random], bytes]] = {
    "broken": lambda chance: mutated(good_line(chance), chance).replace(b"\n", b" "),
    "types": fixed(
        *(
            b'{"text": ' + value + b"}"
            for value in (b"1", b"null", b"true", b"[]", b'["a"]', b'{"text": "a"}', b"1e5", b"-0")
        ),
        *(
            b'"text"',
            b"1",
            b"null",
            b"[]",
            b'["text", "a"]',
            b"{}",
            b'[{"text": "a"}]',
            b'""',
            b"[",
            b"{",
            b"]",
        ),
    ),
    "keys": fixed(
        *(
            b'{"Text": "a"}',
            b'{"": "a"}',
            b'{"text ": "a"}',
            b'{"body": "a", "id": 1}',
            b'{"text\\u0000": "a"}',
        ),
        *(b'{"text": "a", "text": "b"}', b'{"text": 1, "text": "b"}', b'{"text": "a", "text": "a"}'),
        *(b'{"te\\u0078t": "a", "text": "b"}', b'{"text": "a", "\\u0074\\u0065\\u0078\\u0074": "b"}'),
        *(b'{"\\u0074ext": "escaped key"}', b'{"a": {"text": "x", "text": "y"}, "text": "z"}'),
        *(b'{"meta": {"text": "a"}}', b'{"a": [{"text": "a"}, {"text": "b"}], "text": "c"}'),
        *(
            b'{"a": "\\"text\\"", "text": "b"}',
            b'{"a": "text", "text": "text"}',
            b'{"text": "\\"text\\": 1"}',
        ),
        *(b'{"\\ud800": 1, "text": "a"}', b'{"\\ud800": 1}', b'{"text": "a", "\\u0000": "b"}'),
    ),
    "numbers": fixed(
        *(
            b'{"text": "a", "n": ' + n + b"}"
            for n in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e-999", b"01")
        ),
        *(
            b'{"text": "a", "n": ' + n + b"}"
            for n in (b"1.", b".5", b"+1", b"0x1", b"1_0", b"--1", b"1e", b"nan")
        ),
        *(b'{"text": "a", "n": ' + b"9" * digits + b"}" for digits in (19, 20, 40, 400, 4300, 4301, 9000)),
        *(b'{"text": NaN}', b'{"text": Infinity}', b"NaN", b"1e999"),
    ),
    "nesting": lambda chance: (
        chance.choice(
            [
                b'{"text": "deep", "n": %s%s}',
                b'{"text": "deep", "n": %s',
                b'{"n": %s%s, "text": "deep"}',
                b"%s%s",
            ]
        )
        .replace(b"%s", b"[" * (depth := chance.choice([10, 900, 1023, 1024, 1025, 5000, 100_000])), 1)
        .replace(b"%s", b"]" * depth)
    ),
    "surrogates": fixed(
        *(
            b'{"text": "' + t + b'"}'
            for t in (b"\\ud800", b"\\udfff", b"a\\ud83d", b"\\ude42\\ud83d", b"\\ud83d\\ude42")
        ),
        *(
            b'{"text": "' + t + b'"}'
            for t in (b"\\ud83d\\u0041", b"\\uD83D\\uDE42", b"\\ud83dx\\ude42", b"\\u00", b"\\u")
        ),
        *(b'{"id": "\\ud800", "text": "a"}', b'{"text": "\\u0000"}', b'{"text": "\\x41"}', b'{"text": "\\"}'),
    ),
    "bytes": fixed(
        *(
            b'{"text": "a' + t + b'z"}'
            for t in (b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\xaf", b"\xf0\x80\x80\x80", b"\xff")
        ),
        *(
            b'{"text": "a' + t + b'z"}'
            for t in (b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xed\xa0\xbd\xed\xb9\x82", b"\x80")
        ),
        *(
            b'{"text": "a' + t + b'z"}'
            for t in (b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xe2\x82", b"\xf0\x9f\x99")
        ),
        *(
            b'{"text": "a' + t + b'z"}'
            for t in (b"\xef\xbb\xbf", b"\xef\xbf\xbf", b"\xc2\x80", b"\xf4\x8f\xbf\xbf", b"\xfe")
        ),
        *(
            b'{"text": "a", "\xff": 1}',
            b'{"text": "a"}\xff',
            b'\xff\xfe{"text": "a"}',
            b"\xe9",
            b'{"text": "a\xe9',
        ),
        *(
            '{"text": "a"}'.encode("utf-16-le"),
            '{"text": "a"}'.encode("utf-16"),
            '{"text": "a"}'.encode("utf-32-be"),
        ),
    ),
    "controls": fixed(
        *(b'{"text": "a' + bytes([c]) + b'z"}' for c in (0, 1, 8, 9, 11, 12, 13, 27, 31, 127)),
        *(
            b'{"text": "a"}' + tail
            for tail in (b"\x00", b"\x0c", b"\x0b", b"\xc2\xa0", b"\xe2\x80\xa8", b"\x1c", b",")
        ),
        *(
            head + b'{"text": "a"}'
            for head in (b"\x00", b"\x0c", b"\xef\xbb\xbf", b"\xc2\x85", b"\x1e", b" \t", b"\r")
        ),
        *(
            b'{"text": "a"}\r{"text": "b"}',
            b'{"text": "a"} {"text": "b"}',
            b'{"text": "a\xe2\x80\xa8b"}',
            b"\x00" * 600,
        ),
    ),
    "blank": fixed(
        *(
            b"",
            b" ",
            b"\t",
            b"\r",
            b"\x0c",
            b"\x0b",
            b" \r",
            b"\x00",
            b"\x1c",
            b"\xc2\xa0",
            b"\xef\xbb\xbf",
            b"\xe2\x80\xa8",
        ),
        *(b"\x85", b"//", b"#", b"---", b",", b"\xe3\x80\x80", b"\r\r\r", b"\xef\xbb\xbf "),
    ),
}


def chance_file(chance: random.Random, kinds: tuple[str, ...], long: bool = False) -> bytes:
    lines = []
    for _ in range(chance.choice([1, 2, 6, 12])):
        odd = chance.random() < 0.4
        lines.append(ODD_LINES[chance.choice(kinds)](chance) if odd else good_line(chance))
        if long and chance.random() < 0.2:
            lines.append(json.dumps({"text": "x" * chance.choice([0, 1, 60, 5000])}).encode())
    ends = chance.choice([b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"\n \r\n"])
    data = ends.join(lines) + chance.choice([ends, ends, b"", b"\n\n\n", b" ", b"\x00"])
    return chance.choice([b"", b"", b"", b"\xef\xbb\xbf", b"\n"]) + data


def chance_chunks(chance: random.Random, bench: Bench) -> None:
    bench.chunk_bytes(chance.choice([1, 7, 64, 1000, 1 << 20]), chance.choice([1, 13, 100, 1 << 18]))


def run(bench: Bench, seed: str, make: Callable[[random.Random], Case], cases: int = CASES) -> None:
    for number in range(cases):
        chance = random.Random(f"{seed}-{number}")
        case = make(chance)
        chance_chunks(chance, bench)
        with reproducible(f"{seed}-{number}", case):
            bench.check(case)


@pytest.mark.parametrize("block", range(2))
@pytest.mark.parametrize("kind", [*ODD_LINES, "all"])
def test_odd_lines(bench: Bench, kind: str, block: int) -> None:
    kinds = tuple(ODD_LINES) if kind == "all" else (kind,)

    def make(chance: random.Random) -> Case:
        drop = chance.choice([(), (), ("B",), ("A", "é")])
        return Case(".jsonl", chance_file(chance, kinds), drop=drop)

    run(bench, f"lines-{kind}-{block}", make)


def test_every_odd_line_alone_and_between_good_ones(bench: Bench) -> None:
    """The lists above are drawn from by chance; here is each of their lines once, good or bad."""
    chance = random.Random("once")
    lines = sorted({make(chance) for make in ODD_LINES.values() for _ in range(60)})
    for line in lines:
        case = Case(".jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
        with reproducible("once", case):
            bench.check(case)


@pytest.mark.parametrize("chunk_bytes", [1, 33, 64])
def test_lines_at_the_borders_of_chunks(bench: Bench, chunk_bytes: int) -> None:
    """Lines that end one byte before, at, and after the border of a chunk, and of a block of the file."""
    for length in range(max(chunk_bytes - 3, 14), chunk_bytes + 17):
        for read in (1, chunk_bytes + 1, 1 << 18):
            line = b'{"text": "%s"}' % (b"x" * (length - 13))
            data = line + b"\n" + b'{"text": 1}\n' + line + b"\n\n" + line
            bench.chunk_bytes(chunk_bytes, read)
            with reproducible(f"{length}-{read}", data):
                bench.check(Case(".jsonl", data))


def test_lines_of_a_megabyte(bench: Bench) -> None:
    """Longer than a chunk, good and bad, with short ones around."""
    for number, middle in enumerate(
        [b'{"text": "%s"}', b'{"text": "%s"', b'{"text": 1, "a": "%s"}', b'{"text": "\xff%s"}', b"%s"]
    ):
        long = middle % (b"x y " * (5 << 16))
        case = Case(".jsonl", b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n')
        with reproducible(f"long-{number}", middle):
            bench.check(case)


@pytest.mark.parametrize("block", range(2))
def test_text_files(bench: Bench, block: int) -> None:
    def make(chance: random.Random) -> Case:
        data = chance_text(chance).encode() * chance.choice([1, 1, 40])
        data = chance.choice([b"", b"\xef\xbb\xbf", b"\r\n"]) + data
        return Case(".txt", mutated(data, chance) if chance.random() < 0.6 else data)

    run(bench, f"txt-{block}", make)


# --- compressed
# -------------------------------------------------------------------------------------------------


def pieces(chance: random.Random, data: bytes) -> list[bytes]:
    borders = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice([0, 0, 1, 4])))
    return [data[start:stop] for start, stop in zip([0, *borders], [*borders, len(data)], strict=True)]


def zstd_frame(chance: random.Random, data: bytes) -> bytes:
    if chance.random() < 0.15:  # skippable: its content is nobody's
        content = chance.randbytes(chance.choice([0, 4, 300]))
        return (
            bytes([0x50 + chance.randrange(16)])
            + b"\x2a\x4d\x18"
            + len(content).to_bytes(4, "little")
            + content
        )
    compressor = zstandard.ZstdCompressor(
        level=chance.choice([-5, 1, 3]),
        write_checksum=chance.random() < 0.7,
        write_content_size=chance.random() < 0.5,
    )
    if chance.random() < 0.5:
        return compressor.compress(data)
    sink = io.BytesIO()
    with compressor.stream_writer(sink, closefd=False) as writer:
        for start in range(0, len(data), 150):
            writer.write(data[start : start + 150])
            if chance.random() < 0.2:
                writer.flush()
    return sink.getvalue()


def compressed(chance: random.Random, ending: str, data: bytes) -> bytes:
    if ending == ".jsonl.zst":
        return b"".join(zstd_frame(chance, piece) for piece in pieces(chance, data))
    padding = chance.choice([b"", b"", b"\0" * chance.randrange(1, 700)])
    level = chance.choice([0, 1, 9])
    return b"".join(gzip.compress(piece, level, mtime=0) + padding for piece in pieces(chance, data))


@pytest.mark.parametrize("block", range(2))
@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "garbage", "header"])
def test_compressed_files(bench: Bench, ending: str, damage: str, block: int) -> None:
    """
    gzip's CRC finds every flipped bit of the content. Two kinds of damage no reader can see: a cut exactly
    between two frames or members, after which the file is a whole shorter one, and flipped bits in a zstd
    frame without a checksum that decode to other characters of a valid record. The oracle decodes to the
    same.
    """

    def make(chance: random.Random) -> Case:
        data = compressed(
            chance, ending, chance_file(chance, ("broken", "keys", "bytes", "blank"), long=True)
        )
        whole, at = data, chance.randrange(len(data) + 1)
        if damage == "cut":
            data = data[
                : chance.choice([at, at, 0, 1, 2, 3, 9, 10, 11, len(data) - 1, len(data) - 4, len(data) - 8])
            ]
        elif damage == "flipped":
            data = mutated(data, chance)
        elif damage == "garbage":
            junk = [
                b"\0",
                b"\0" * 1000,
                b"\n",
                b"garbage",
                data[:3],
                data[:12],
                b'{"text": "plain"}\n',
                b"\x28\xb5\x2f\xfd",
            ]
            data = chance.choice([data + chance.choice(junk), data[:at] + chance.choice(junk) + data[at:]])
            data = chance.choice(
                [data, data, data, b"", b"\0", b"\0\0\0\0", chance.choice(junk), chance.randbytes(40)]
            )
        elif damage == "header" and data:
            at = min(chance.randrange(14), len(data) - 1)
            data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        # Flags of a header that no writer sets are refused by one reader and passed over by another.
        intact = whole if damage in ("flipped", "header") else None
        return Case(ending, data, lenient=damage in ("flipped", "header", "garbage"), intact=intact)

    run(bench, f"{ending}-{damage}-{block}", make)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_cut_at_every_byte(bench: Bench, ending: str) -> None:
    """Two members or frames of one record each; only between them a cut leaves a whole file."""
    chance, whole = random.Random("cut"), []
    parts = [b'{"text": "first"}\n', b'{"text": "second"}\n']
    data = b"".join(
        gzip.compress(part) if ending == ".jsonl.gz" else zstandard.compress(part) for part in parts
    )
    for size in range(len(data) + 1):
        chance_chunks(chance, bench)
        with reproducible(str(size), data[:size]):
            bench.check(Case(ending, data[:size]))
            whole += [size] if _is_whole(Case(ending, data[:size])) else []
    assert len(whole) == 2 and whole[-1] == len(data)


def _is_whole(case: Case) -> bool:
    from support.record_oracle import Damaged, records_of

    try:
        return bool(records_of(case))
    except Damaged:
        return False
