"""Records of runs, as ``metrics.jsonl`` has them: one JSON object per line, with at least ``step`` and
``kind``.

Files are read in pieces, since those of long runs are large; and with care, since people edit them, disks
damage them, and kills tear their last line.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import reprlib
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from megatron_lpa.errors import TryAgain
from megatron_lpa.files import fsync_folder, is_dir, new_file, open_regular, patiently, sha256, status

Record = dict[str, Any]
"""One line of ``metrics.jsonl``; ``kind`` is train, valid, test or event, or a callback's own."""

NUMBERS = {
    "train": ("tokens", "loss", "step_ms"),
    "valid": ("tokens", "loss"),
    "test": ("tokens", "loss"),
    "event": (),
}
"""What a record of each kind has besides its step. Nothing is known of other kinds."""

LARGEST_LOSS = math.log(sys.float_info.max)
"""Of which there is a perplexity."""

MOST_RECORD_BYTES = 16 << 20
"""Of one line: far more than a record has, also one with messages of many processes."""

_BLOCK_BYTES = 1 << 20
_MOST_NAMED = 3
_MOST_SEQUENCES = 10_000


class NoRecord(ValueError):
    """Why a line is no record, in words that follow the name of its file and its number."""


class NoStep(NoRecord):
    """A line of a kind that is not ours, and without a step: nobody here reads it, and it is no damage."""


def perplexity(loss: float) -> float:
    """``exp(loss)``; infinite where that is beyond a float64, and NaN of NaN."""
    return math.inf if loss > LARGEST_LOSS else math.exp(loss)


@dataclass(frozen=True)
class Line:
    """One line of a file of records.

    Args:
        number: counted from 1.
        content: without its newline; empty when it is longer than any record.
        ended: whether it has a newline. The last line of a killed process may have none.
        too_long: of how many bytes it is, where that is more than a record can have; else 0.
    """

    number: int
    content: bytes
    ended: bool
    too_long: int = 0

    def record(self) -> Record:
        """What it says.

        Raises:
            NoRecord: not a JSON object with a number ``step`` from 0 on, a text ``kind`` and the ``NUMBERS``
                of that kind.
            NoStep: it has a kind that is not in ``NUMBERS``, and no step.
        """
        if self.too_long:
            raise NoRecord(
                f"{self.too_long:,} bytes, more than the {MOST_RECORD_BYTES:,} that a record can have"
            )
        try:
            record = json.loads(self.content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise NoRecord(f"not UTF-8 text (byte {error.start} of the line)") from error
        except json.JSONDecodeError as error:
            raise NoRecord(f"not valid JSON ({error.msg} at character {error.pos})") from error
        except RecursionError as error:
            raise NoRecord("not valid JSON (nested too deeply)") from error
        except ValueError as error:  # more digits than Python turns into a number
            raise NoRecord(f"not valid JSON ({str(error)[:100]})") from error
        if not isinstance(record, dict):
            raise NoRecord("not a JSON object")
        step, kind = record.get("step"), record.get("kind")
        if isinstance(kind, str) and kind not in NUMBERS and step is None:
            raise NoStep(f"its kind is {reprlib.repr(kind)}, and it has no step")
        if not is_finite_number(step) or step < 0:
            raise NoRecord(f"its step is {reprlib.repr(step)}, not a number of steps")
        if not isinstance(kind, str):
            raise NoRecord(f"its kind is {reprlib.repr(kind)}, not text")
        for name in NUMBERS.get(kind, ()):
            if name not in record:
                raise NoRecord(f"this {kind} record has no {name}")
            value = record[name]
            if not is_finite_number(value) and not (name == "loss" and _is_not_finite(value)):
                raise NoRecord(f"the {name} of this {kind} record is {reprlib.repr(value)}, not a number")
        return record


def _is_not_finite(loss: Any) -> bool:
    """Whether it stands for a loss that was not finite; JSON has no number for it."""
    return loss is None or (isinstance(loss, float) and not math.isfinite(loss))


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether a value from JSON is a number that a float64 can hold; true and false are none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file of records, without those that are blank. It holds one line at a time.

    Raises:
        UnusableFile: not a regular file.
        OSError: it is not there, or may not be read.
        TryAgain: the disk does not give it, or it was replaced meanwhile.
    """
    start, length, number = bytearray(), 0, 0
    for block in _blocks(path):
        *ends, rest = block.split(b"\n")
        for end in ends:
            number, length = number + 1, length + len(end)
            yield from _line(number, start + end, length, ended=True)
            start, length = bytearray(), 0
        length += len(rest)
        if length <= MOST_RECORD_BYTES:
            start += rest
    yield from _line(number + 1, start, length, ended=False)


def _line(number: int, content: bytearray, length: int, ended: bool) -> Iterator[Line]:
    if length > MOST_RECORD_BYTES:
        yield Line(number, b"", ended, length)
    elif content.strip():
        yield Line(number, bytes(content), ended)


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's contents in pieces; each is asked for again where the disk does not answer."""
    offset, identity = 0, None

    def read() -> tuple[tuple[int, int], bytes]:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            file.seek(offset)
            return (status.st_dev, status.st_ino), file.read(_BLOCK_BYTES)

    while True:
        found, block = patiently(read, path)
        if identity not in (None, found):
            raise TryAgain(f"{path}: was replaced while it was read; read it again")
        if not block:
            return
        identity, offset = found, offset + len(block)
        yield block


class Steps:
    """Which steps there are records of, kind by kind, in little memory: as sequences of equal distances.

    Of very many sequences the last ones are known.
    """

    def __init__(self) -> None:
        self._sequences: dict[str, list[tuple[float, float, int]]] = {kind: [] for kind in NUMBERS}

    def add(self, record: Record) -> None:
        """Count a record in; those of unknown kinds do not count."""
        sequences, step = self._sequences.get(record["kind"]), record["step"]
        if sequences is None:
            return
        if sequences:
            first, distance, count = sequences[-1]
            last = first + distance * (count - 1)
            if step == last:
                return
            if count == 1 or step == first + distance * count:
                sequences[-1] = first, step - last, count + 1
                return
        sequences.append((step, 0, 1))
        del sequences[:-_MOST_SEQUENCES]

    def has(self, kind: str, step: float) -> bool:
        """Whether there is a record of this kind and step."""
        return any(
            step == first or (distance and (step - first) / distance in range(count))
            for first, distance, count in self._sequences.get(kind, ())
        )

    def missing_in(self, other: Steps) -> str:
        """Which of these steps ``other`` has no records of, in words; empty where it has all."""
        return ", ".join(
            f"{kind} records of {steps}"
            for kind, sequences in self._sequences.items()
            if sequences != other._sequences[kind]
            and (steps := _named_steps(_all(sequences), _all(other._sequences[kind])))
        )


def _all(sequences: list[tuple[float, float, int]]) -> set[float]:
    return {first + distance * i for first, distance, count in sequences for i in range(count)}


def _named_steps(wanted: set[float], found: set[float]) -> str:
    """Those of ``wanted`` that are not ``found``: neighbours as "FIRST to LAST"."""
    groups = [
        list(group)
        for is_found, group in itertools.groupby(sorted(wanted), found.__contains__)
        if not is_found
    ]
    names = [f"{g[0]}" if len(g) == 1 else f"{g[0]} to {g[-1]}" for g in groups[:_MOST_NAMED]]
    if len(groups) > _MOST_NAMED:
        names.append(f"{sum(map(len, groups[_MOST_NAMED:]))} more")
    plural = "s" if sum(map(len, groups)) > 1 else ""
    return f"step{plural} {' and '.join(names)}" if names else ""


@dataclass(frozen=True)
class Kept:
    """What ``keep_records`` left.

    Args:
        last_step: the highest step of what stayed; -1 where nothing did.
        steps: of what stayed.
        damage: which lines were no records, and where the file as it was is kept; None when all were.
        not_on_disk: what the disk said when the new file's name was brought to it; None when it was. A power
            cut may bring back the file as it was.
    """

    last_step: float = -1
    steps: Steps = field(default_factory=Steps)
    damage: str | None = None
    not_on_disk: OSError | None = None


def keep_records(path: Path, wanted: Callable[[Record], bool], aside: str) -> Kept:
    """Write a file of records anew with those that are ``wanted``, byte for byte as they are. No file is none
    to write.

    A torn last line goes. Where any other line is no record, the file as it was stays beside the new one.
    There is always a file with the name, and what other names lead to is not written.

    Args:
        path: the file; its new contents appear whole or not at all. A link is replaced, not followed.
        wanted: says of a record whether it stays.
        aside: name for the file as it was, with a number where another file has it already.

    Raises:
        UnusableFile, TryAgain: as ``read_lines``.
        OSError: the file may not be read, or cannot be written. Nothing has changed then.
    """
    partial = path.with_name(f".{path.name}.partial")
    damaged: list[str] = []
    count, last_step, steps = 0, -1.0, Steps()
    try:
        with new_file(partial) as file:
            for line in read_lines(path):
                try:
                    record = line.record()
                except NoStep:
                    if line.ended:
                        file.write(line.content + b"\n")
                    continue
                except NoRecord as problem:
                    if line.ended or line.too_long:
                        count += 1
                        damaged += [f"line {line.number}: {problem}"] if count <= _MOST_NAMED else []
                    continue
                if wanted(record):
                    file.write(line.content + b"\n")
                    last_step = max(last_step, record["step"])
                    steps.add(record)
        damage = None
        if count:
            kept = _set_aside(path, aside)
            more = f"; and {count - _MOST_NAMED} more" if count > _MOST_NAMED else ""
            damage = (
                f"{path}: {count} line{'s' * (count > 1)} left out that {'are' if count > 1 else 'is'} no "
                f"record ({'; '.join(damaged)}{more}); the file as it was is {kept.name}"
            )
        os.replace(partial, path)
    except FileNotFoundError:
        _remove(partial)
        if is_dir(path.parent) and status(path, follow_links=False) is None:
            return Kept()
        raise
    except BaseException:
        _remove(partial)
        raise
    # From here on the file is another one, whatever the disk says.
    try:
        fsync_folder(path.parent)
    except OSError as error:
        return Kept(last_step, steps, damage, error)
    return Kept(last_step, steps, damage)


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)


def _set_aside(path: Path, name: str) -> Path:
    """Give the file's contents a second name, which stays when the first goes to its successor.

    A name that an attempt before this one has made is used again.
    """
    number, kept = 1, path.with_name(name)
    while (found := status(kept, follow_links=False)) is not None:
        if _is_same(path, kept, found):
            return kept
        number += 1
        kept = path.with_name(f"{Path(name).stem}.{number}{Path(name).suffix}")
    try:
        os.link(path, kept, follow_symlinks=False)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:  # a file system without hard links
        partial = kept.with_name(f".{kept.name}.partial")
        try:
            with new_file(partial) as file:
                for block in _blocks(path):
                    file.write(block)
            os.rename(partial, kept)
        except BaseException:
            _remove(partial)
            raise
    return kept


def _is_same(path: Path, kept: Path, found: os.stat_result) -> bool:
    """Whether another file has the same contents; ``found`` is its status."""
    if not stat.S_ISREG(found.st_mode) or found.st_size != patiently(lambda: os.stat(path), path).st_size:
        return False
    try:
        contents = patiently(lambda: sha256(kept), kept)
    except OSError:  # it may not be read
        return False
    return contents == patiently(lambda: sha256(path), path)


def write_again(file: BinaryIO, path: Path) -> int:
    """Give the contents of an open file, which need not have a name any more, the name ``path``.

    Returns:
        How many bytes the disk still had of it.

    Raises:
        OSError: they cannot be written.
    """
    partial, copied = path.with_name(f".{path.name}.partial"), 0
    with new_file(partial) as copy:
        while block := _piece(file, copied):
            copied += copy.write(block)
    os.replace(partial, path)
    return copied


def _piece(file: BinaryIO, offset: int) -> bytes:
    """Empty at the file's end, and where the disk has it no more."""
    try:
        return os.pread(file.fileno(), _BLOCK_BYTES, offset)
    except OSError:
        return b""
