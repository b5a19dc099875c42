"""One run of preprocessing on a malformed input, compared with what the oracle says of it.

The cases are in ``tests/unit/preparation/test_preparation_fuzz_*.py``. Each is made from a seed that its
failure prints.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.tokenizers.opening import load_tokenizer
from megatron_lpa.errors import UserError
from megatron_lpa.preparation import encode as encode_module
from megatron_lpa.preparation import preprocess as preprocess_module
from megatron_lpa.preparation import readers
from megatron_lpa.preparation.preprocess import preprocess
from megatron_lpa.preparation.preprocess_config import PreprocessConfig
from support.preprocessing import in_this_process
from support.record_oracle import Case, Damaged, Record, records_of

CASE_SECONDS = 10  # of this process's own time, so that a busy machine does not count


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
        """The first bad record is named; told to leave it out after all, the run goes on to the same
        files."""
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
