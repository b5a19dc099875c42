"""Damaged ledgers of unfinished work: refused, or the run still ends with the right files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fuzz_bench import Bench, mutated, reproducible, time_limit

from megatron_lpa.errors import UserError
from megatron_lpa.preparation.preprocess import preprocess

pytestmark = pytest.mark.timeout(300)

LINES = [
    json.dumps({"text": f"text {i}", "meta": {"pile_set_name": "AB"[i % 2]}}).encode() for i in range(24)
]


@pytest.fixture
def bench(tmp_path: Path, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, bpe_folder, monkeypatch)


def lines_mixed(data: bytes, chance: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    kind = chance.randrange(5)
    if kind == 0:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 1:
        del lines[one]
    elif kind == 2:
        lines.insert(other, lines[one])
    elif kind == 3:
        lines[one] = chance.choice(
            [b"\n", b"{}\n", b"null\n", b'{"position": []}\n', b"[" * 100_000 + b"\n", b"\0" * 50]
        )
    else:
        lines = lines[:one]
    return b"".join(lines)


def digit_changed(data: bytes, chance: random.Random) -> bytes:
    """Still JSON, and still the same kinds of values: only a checksum can tell."""
    places = [at for at, byte in enumerate(data) if chr(byte).isdigit()]
    at = chance.choice(places)
    return data[:at] + str((int(chr(data[at])) + chance.randrange(1, 10)) % 10).encode() + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": mutated,
    "cut": lambda data, chance: data[: chance.randrange(len(data))],
    "lines": lines_mixed,
    "digits": digit_changed,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ledgers(bench: Bench, damage: str) -> None:
    bench.chunk_bytes(60, 60)
    with bench.fresh() as folder:
        paths = tuple(f"{folder}/{name}.jsonl" for name in "abc")
        good = [b"\n".join([*LINES[start : start + 8], b"not JSON", b""]) for start in (0, 8, 16)]
        options = {"drop_subsets": ("B",), "commit_interval_s": 1e-9}
        for path, data in zip(paths, good, strict=True):
            Path(path).write_bytes(data)
        preprocess(bench.config(paths, **options))
        expected = bench.outputs()
        shutil.rmtree(bench.folder / "out")
        bench.patch.setattr("megatron_lpa.preparation.preprocess._TASK_CHUNKS", 2)
        _stop_in_the_last_file(bench, paths, options)
        unfinished = bench.outputs()
        ledger = unfinished["x.ledger.partial"]
        assert ledger.count(b"\n") > 8
        for number in range(60):
            chance = random.Random(f"{damage}-{number}")
            shutil.rmtree(bench.folder / "out")
            (bench.folder / "out").mkdir()
            for name, data in unfinished.items():
                (bench.folder / "out" / name).write_bytes(data)
            changed = DAMAGES[damage](ledger, chance)
            (bench.folder / "out" / "x.ledger.partial").write_bytes(changed)
            with reproducible(f"{damage}-{number}", changed), time_limit():
                try:
                    preprocess(bench.config(paths, **options))
                except UserError as error:
                    assert "x.ledger.partial" in str(error)
                    assert bench.outputs() == unfinished | {"x.ledger.partial": changed}
                    preprocess(bench.config(paths, **options, restart=True))
                assert bench.outputs() == expected


def _stop_in_the_last_file(bench: Bench, paths: tuple[str, ...], options: dict[str, object]) -> None:
    from megatron_lpa.preparation.preprocess import ordered_map  # in this process

    class Killed(BaseException):
        pass

    def killed(function: object, tasks: object, *arguments: object):  # type: ignore[no-untyped-def]
        for number, result in enumerate(ordered_map(function, tasks, *arguments)):  # type: ignore[arg-type]
            if number == 11:
                raise Killed
            yield result

    with bench.patch.context() as patch:
        patch.setattr("megatron_lpa.preparation.preprocess.ordered_map", killed)
        with pytest.raises(Killed):
            preprocess(bench.config(paths, **options))
