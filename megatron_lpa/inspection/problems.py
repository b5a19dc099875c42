"""What is wrong with a dataset, and where."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

_LISTED = 20


@dataclass(frozen=True)
class Problem:
    """Something wrong in bytes ``start`` up to, not including, ``stop`` of a file; equal ones mean no place.

    ``kind`` is one word for programs.
    """

    kind: str
    path: str
    start: int
    stop: int
    message: str

    def __str__(self) -> str:
        place = f"bytes {self.start} to {self.stop - 1}: " if self.stop > self.start else ""
        return f"{self.path}: {place}{self.message}"


@dataclass
class ProblemLog:
    """Collects problems. Of each kind only the first ones are kept: a wrong file would give millions."""

    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def wants(self, kind: str) -> int:
        """How many more problems of a kind will be kept."""
        return max(_LISTED - self.counts.get(kind, 0), 0)

    def add(self, kind: str, path: Path, message: str, start: int = 0, stop: int = 0) -> None:
        if self.wants(kind):
            self.problems.append(Problem(kind, str(path), start, stop, message))
        self.count(kind, 1)

    def count(self, kind: str, number: int) -> None:
        """Counts problems that were found but not described."""
        self.counts[kind] = self.counts.get(kind, 0) + number

    def unlisted(self) -> dict[str, int]:
        """How many problems of each kind are not in ``problems``."""
        return {kind: count - _LISTED for kind, count in self.counts.items() if count > _LISTED}
