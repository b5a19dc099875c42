"""Damaged token datasets: a message, or nothing that the damage changed."""

from __future__ import annotations

import json
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fuzz_bench import Bench, mutated, reproducible, time_limit

from megatron_lpa.data.storage.dataset_manifest import Manifest, read_manifest
from megatron_lpa.data.storage.indexed import HEADER, MAGIC, IndexedDataset
from megatron_lpa.errors import UserError
from megatron_lpa.inspection.document_view import view_document
from megatron_lpa.inspection.rendering import summary_json, summary_text
from megatron_lpa.inspection.statistics import summarize
from megatron_lpa.inspection.verification import verify
from megatron_lpa.preparation.merge import merge
from megatron_lpa.preparation.preprocess import preprocess

pytestmark = pytest.mark.timeout(300)

CASES = 60
MEMORY_BYTES = 1 << 30  # more than the process had before


@pytest.fixture
def bench(tmp_path: Path, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, bpe_folder, monkeypatch)


@pytest.fixture
def datasets(bench: Bench) -> Iterator[Path]:
    """A folder with the datasets ``a`` and ``b``, whole."""
    with bench.fresh() as folder:
        for name in "ab":
            path = folder / f"{name}.jsonl"
            records = [
                {"text": f"{name} {i}" * i, "meta": {"pile_set_name": "xyz"[i % 3]}} for i in range(1, 10)
            ]
            path.write_text("\n".join(map(json.dumps, records)))
            preprocess(bench.config((str(path),), append_eod=True))
            for ending in ("bin", "idx", "json"):
                (bench.folder / "out" / f"x_text_document.{ending}").rename(folder / f"{name}.{ending}")
            path.unlink()
        yield folder


def contents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    documents = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert [token for document in documents for token in document] == dataset.tokens(
        0, dataset.num_tokens
    ).tolist()
    assert dataset.document_sizes(0, dataset.num_documents).tolist() == list(map(len, documents))
    return documents


def look_at(prefix: str) -> None:
    """Everything that the inspection tool can do."""
    summary = summarize(prefix)
    summary_text(summary)
    json.dumps(summary_json(summary))
    view_document(prefix, -1)


def joined(folder: Path, **options: bool) -> list[list[int]]:
    merge([f"{folder}/a", f"{folder}/b"], f"{folder}/m", overwrite=True, **options)
    return contents(folder / "m")


def attempt(function: Callable[[], Any]) -> Any:
    """What it gives; ``None`` where it refuses."""
    try:
        with time_limit():
            return function() or True
    except UserError:
        return None


def check(folder: Path, ending: str, data: bytes, with_manifest: bool = True) -> None:
    """Puts ``data`` in the place of one file of ``a``, and looks at it in every way."""
    path, manifest = folder / f"a.{ending}", folder / "a.json"
    whole = {file: file.read_bytes() for file in (path, manifest)}
    expected, merged = contents(folder / "a"), contents(folder / "a") + contents(folder / "b")
    path.write_bytes(data)
    if not with_manifest:
        manifest.unlink()
    changed = data != whole[path]
    try:
        found = attempt(lambda: contents(folder / "a"))
        verification = attempt(lambda: verify(f"{folder}/a"))
        attempt(lambda: look_at(f"{folder}/a"))
        attempt(lambda: read_manifest(folder / "a"))
        attempt(lambda: joined(folder, verify=False, allow_missing_manifests=True))
        checked = attempt(lambda: joined(folder))
        if ending == "json":
            assert found == expected and checked in (None, merged)
        elif changed and with_manifest:
            assert verification is None or verification.problems, "damage not found"
            assert checked is None, "damage merged"
        elif not changed:
            assert found == expected and not verification.problems
    finally:
        for file, content in whole.items():
            file.write_bytes(content)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("ending", ["bin", "idx", "json"])
def test_damaged_bytes(datasets: Path, ending: str, with_manifest: bool) -> None:
    if ending == "json" and not with_manifest:
        return
    data = (datasets / f"a.{ending}").read_bytes()
    for number in range(CASES * (3 if ending == "json" else 1)):
        changed = mutated(data, random.Random(f"{ending}-{number}"))
        with reproducible(f"{ending}-{number}", changed):
            check(datasets, ending, changed, with_manifest)


ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    10**30,
    "",
    "a",
    "9",
    "\ud800",
    [],
    ["a"],
    [1],
    {},
    {"a": 1},
    float("nan"),
]


@pytest.mark.parametrize(
    "key",
    ["format", *Manifest.__dataclass_fields__],
)
def test_manifests_of_odd_values(datasets: Path, key: str) -> None:
    """JSON as it should be, of an object as it should be, with one value that should not be there."""
    whole = json.loads((datasets / "a.json").read_bytes())
    for place in places(whole[key], (key,)):
        for value in ODD_VALUES:
            content = json.loads((datasets / "a.json").read_bytes())
            inner = content
            for part in place[:-1]:
                inner = inner[part]
            inner[place[-1]] = value
            with reproducible(f"{place} {value!r}", place):
                check(datasets, "json", json.dumps(content).encode())
        del inner[place[-1]]
        with reproducible(f"{place} removed", place):
            check(datasets, "json", json.dumps(content).encode())


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if before:
        yield before
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*before, key))


def test_manifests_of_odd_json(datasets: Path) -> None:
    for content in (
        b"",
        b"null",
        b"[]",
        b"{}",
        b"1",
        b'"a"',
        b'{"format": 2}',
        b"[" * 100_000,
        b"\xff",
        b"\0" * 100,
        b"1" * 5000,
    ):
        with reproducible(repr(content[:20]), content):
            check(datasets, "json", content)


# --- headers, in little memory
# ----------------------------------------------------------------------------------

COUNTS = [
    0,
    1,
    2,
    8,
    9,
    10,
    11,
    255,
    1 << 16,
    1 << 20,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 40,
    1 << 60,
    1 << 61,
]
COUNTS += [
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    ((1 << 64) - 34) // 12,
    (1 << 64) // 20,
    (1 << 64) // 12 + 1,
]


def chance_header(chance: random.Random, rest: bytes) -> bytes:
    magic = chance.choice([MAGIC, MAGIC, MAGIC, MAGIC, b"MMIDIDX\0\1", b"TNTIDX\0\0\0"])
    version = chance.choice([1, 1, 1, 1, 0, 2, 1 << 56])
    code = chance.choice([8, 8, 8, 1, 2, 3, 4, 5, 6, 7, 0, 9, 255])
    sequences, documents = chance.choice([*COUNTS, 9, 9, 9, 9]), chance.choice([*COUNTS, 10, 10, 10])
    header = struct.pack("<9sQBQQ", magic, version, code, sequences, documents)
    assert len(header) == HEADER.size
    if chance.random() < 0.5:  # a file as long as the header says, where that is possible
        size = 12 * sequences + 8 * documents
        kinds = [b"\0", b"\xff", b"\x01", b"\x7f"]
        rest = chance.choice(kinds) * size if size <= 1 << 23 else rest
    return header + rest[: chance.choice([len(rest), len(rest), 0, 1, max(len(rest) - 1, 0)])]


def run_headers(folder: str) -> None:
    """Run by a process of its own."""
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY_BYTES,) * 2)
    rest = (Path(folder) / "a.idx").read_bytes()[HEADER.size :]
    for number in range(300):
        data = chance_header(random.Random(f"header-{number}"), rest)
        with reproducible(f"header-{number}", data[:60]):
            check(Path(folder), "idx", data, with_manifest=number % 2 == 0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures with Linux's /proc")
def test_headers_of_any_counts_need_little_memory(datasets: Path) -> None:
    code = f"import test_preparation_fuzz_files; test_preparation_fuzz_files.run_headers({str(datasets)!r})"
    root = Path(__file__).parents[3]
    environment = {
        "PYTHONPATH": f"{Path(__file__).parent}:{root / 'tests'}:{root}",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    environment["OPENBLAS_NUM_THREADS"] = "1"
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_sizes_and_pointers_at_the_limits(datasets: Path) -> None:
    """Entries of the index at the ends of their ranges, where sums can run over."""
    data = (datasets / "a.idx").read_bytes()
    for number in range(CASES):
        chance = random.Random(f"limits-{number}")
        sizes = np.frombuffer(data, "<i4", 9, HEADER.size).copy()
        pointers = np.frombuffer(data, "<i8", 9, HEADER.size + 36).copy()
        indices = np.frombuffer(data, "<i8", 10, HEADER.size + 108).copy()
        for array in chance.choices([sizes, pointers, indices], k=chance.choice([1, 2, 6])):
            limits = np.iinfo(array.dtype)
            array[chance.randrange(len(array))] = chance.choice(
                [limits.min, limits.max, -1, 0, 1, limits.max - 1]
            )
        changed = data[: HEADER.size] + sizes.tobytes() + pointers.tobytes() + indices.tobytes()
        with reproducible(f"limits-{number}", changed):
            check(datasets, "idx", changed, with_manifest=chance.random() < 0.5)


@pytest.mark.parametrize(
    "target, ending",
    [
        ("loop", "bin"),
        ("loop", "idx"),
        ("loop", "json"),
        *(("/proc/self/mem", ending) for ending in ("bin", "idx", "json")),
        *((target, ending) for target in ("/dev/null", "nowhere", ".") for ending in ("bin", "idx", "json")),
    ],
)
def test_a_link_in_the_place_of_a_file(datasets: Path, target: str, ending: str) -> None:
    path = datasets / f"a.{ending}"
    path.unlink()
    path.symlink_to(path if target == "loop" else target)
    for function in (look_at, verify, read_manifest, IndexedDataset):
        attempt(lambda function=function: function(f"{datasets}/a"))  # type: ignore[misc]
    attempt(lambda: joined(datasets))
    attempt(lambda: joined(datasets, verify=False, allow_missing_manifests=True))
