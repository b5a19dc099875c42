"""The ledger of a preprocessing run: what was done so far, so that a killed run goes on where it was.

``<output prefix>.ledger.partial`` is JSON lines. The first says which job it is; each later one says how far
the job had come at one moment, after everything up to there was brought to disk. A line that a kill cut off
does not count. The file goes when the outputs are complete.

Every line ends with a digest of itself and of all before it: a wrong count would make wrong outputs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_lpa.data.storage.indexed_writer import WriterPosition
from megatron_lpa.data.storage.partial_file import PARTIAL_SUFFIX, PartialFile
from megatron_lpa.errors import UserError
from megatron_lpa.files import read_bytes, unreadable
from megatron_lpa.preparation.encode import Counts, Position

_FORMAT = 2
_MOST_BYTES = 1 << 34  # weeks of lines with thousands of subsets each
_RESTART = "pass --restart to discard the unfinished work, or choose another --output-prefix"


@dataclass(frozen=True)
class FinishedSource:
    """A source read to its end. ``documents`` has what each output got of it."""

    path: str
    size_bytes: int
    sha256: str | None
    documents: list[int]
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass
class State:
    """How far a job has come.

    Args:
        position: what has been read.
        writers: where the writer of each output is.
        counts: totals of each output.
        dropped: records left out because of their subset, by its name.
        rejected: bad records left out.
        rejected_bytes: length of the reject file.
        finished: the sources read to their end, in order.
        source_documents: documents of each output so far from the source that ``position`` names.
        all_read: nothing is left to read; only names remain to be given.
    """

    writers: list[WriterPosition]
    counts: list[Counts]
    position: Position = Position()  # noqa: RUF009 - frozen
    dropped: dict[str, int] = field(default_factory=dict)
    rejected: int = 0
    rejected_bytes: int = 0
    finished: list[FinishedSource] = field(default_factory=list)
    source_documents: list[int] = field(default_factory=list)
    all_read: bool = False

    def copy(self) -> State:
        """A state that can be changed without changing this one."""
        return replace(
            self,
            counts=[replace(counts, subsets=dict(counts.subsets)) for counts in self.counts],
            dropped=dict(self.dropped),
            finished=list(self.finished),
        )


class Ledger:
    """An open ledger; holding it keeps other processes from doing the same job.

    Args:
        output_prefix: as given to preprocessing.
        job: everything that decides the outputs, as JSON values.
        outputs: how many datasets are written.
        restart: forget what an earlier run did.

    Attributes:
        state: where the last run stopped, or the beginning.
        resumed: whether there was an earlier run.

    Raises:
        UserError: an earlier run was of another job, or another process is at work.
    """

    def __init__(self, output_prefix: str, job: dict[str, Any], outputs: int, restart: bool) -> None:
        partial = ledger_path(output_prefix)
        lines = [] if restart else _whole_lines(partial)
        self._digest = hashlib.sha256()
        self._broken = False
        self.state = State([WriterPosition()] * outputs, [Counts() for _ in range(outputs)])
        self._logged = self.state
        kept_bytes = 0
        if len(lines) > 1:  # the first line alone is no work that could be lost
            _check_digests(partial, lines, self._digest)
            _check_same_job(partial, lines[0], job)
            kept_bytes = sum(map(len, lines))
            for line in lines[1:]:
                self.state = _folded(self.state, json.loads(line))
            self._logged = self.state
        self.resumed = len(lines) > 1
        self._file = PartialFile.open(partial.with_suffix(""), kept_bytes)
        if not self.resumed:
            self._append({"format": _FORMAT, "job": job})

    def commit(self, state: State) -> None:
        """Adds ``state``, which has to be on disk already."""
        self._append(_news(self._logged, state))
        self._logged = state.copy()

    def remove(self) -> None:
        self._file.discard()

    def close(self) -> None:
        """Leaves the ledger for a later run."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        if self._broken:  # a line that came only half to disk must stay the last
            raise UserError(f"{self._file.partial_path}: could not be written before")
        self._broken = True
        self._file.write(_with_digest(line, self._digest))
        self._file.finish()
        self._broken = False


def _with_digest(content: dict[str, Any], digest: Any) -> bytes:
    """A line of the file; ``digest`` is of all lines before it, and goes on over this one."""
    digest.update(json.dumps(content).encode())
    return (json.dumps({**content, "digest": digest.hexdigest()}) + "\n").encode()


def _check_digests(path: Path, lines: list[bytes], digest: Any) -> None:
    if json.loads(lines[0]).get("format") != _FORMAT:
        raise UserError(f"{path}: unfinished work of another version of this tool; {_RESTART}")
    for number, line in enumerate(lines, start=1):
        content = json.loads(line)
        content.pop("digest", None)
        if _with_digest(content, digest) != line:
            raise UserError(f"{path}:{number}: damaged; {_RESTART}")


def ledger_path(output_prefix: str) -> Path:
    """Where the ledger of a run is; it never loses the ending of unfinished files."""
    return Path(f"{output_prefix}.ledger{PARTIAL_SUFFIX}")


def _whole_lines(path: Path) -> list[bytes]:
    """The lines that are complete; a kill can only have cut off the last."""
    try:
        data = read_bytes(path, _MOST_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(path, error) from error
    lines = data.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            assert isinstance(json.loads(line), dict)
        except (ValueError, RecursionError, AssertionError):
            raise UserError(f"{path}:{number}: damaged; {_RESTART}") from None
    return lines


def _check_same_job(path: Path, header: bytes, job: dict[str, Any]) -> None:
    earlier_job = json.loads(header)["job"]
    job = json.loads(json.dumps(job))  # tuples as lists, as they come back
    for key in sorted(job.keys() | earlier_job.keys()):
        if job.get(key) != earlier_job.get(key):
            raise UserError(
                f"{path}: unfinished work of another call: "
                f"{_difference(key, earlier_job.get(key), job.get(key))}; {_RESTART}"
            )


def _difference(key: str, was: Any, now: Any) -> str:
    """What differs, in words. Inputs are lists whose first three entries are name, size and date."""
    name = key.replace("_", " ")
    if key == "inputs" and isinstance(was, list) and isinstance(now, list):
        for old, new in zip(was, now, strict=False):
            if old[0] != new[0]:
                return f"the input {old[0]} was where {new[0]} is now"
            if old != new:
                return f"the input {old[0]} changed ({old[1]} bytes before, {new[1]} now, or another date)"
        return f"there were {len(was)} inputs, and now {len(now)}"
    if isinstance(was, list) and isinstance(now, list):
        was, now = ", ".join(map(str, was)) or "none", ", ".join(map(str, now)) or "none"
    return f"{name} was {was}, and now {now}"


def _news(before: State, after: State) -> dict[str, Any]:
    """``after`` as JSON, with only the new part of what can get long."""
    return {
        "position": [after.position.source, after.position.records],
        "writers": [
            [now.sequences, now.tokens, now.digests[len(was.digests) :]]
            for was, now in zip(before.writers, after.writers, strict=True)
        ],
        "counts": [asdict(counts) for counts in after.counts],
        "dropped": after.dropped,
        "rejected": [after.rejected, after.rejected_bytes],
        "finished": [asdict(source) for source in after.finished[len(before.finished) :]],
        "source_documents": after.source_documents,
        "all_read": after.all_read,
    }


def _folded(before: State, news: dict[str, Any]) -> State:
    return State(
        [
            WriterPosition(sequences, tokens, (*was.digests, *digests))
            for was, (sequences, tokens, digests) in zip(before.writers, news["writers"], strict=True)
        ],
        [Counts(**counts) for counts in news["counts"]],
        Position(*news["position"]),
        news["dropped"],
        news["rejected"][0],
        news["rejected"][1],
        [*before.finished, *(FinishedSource(**source) for source in news["finished"])],
        news["source_documents"],
        news["all_read"],
    )
