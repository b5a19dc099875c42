"""Exceptions that mean "the user can mend this", and the exit codes of all commands, which launchers read.

0 is done, 128 + n ended by signal n, and the others are the constants here.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

MOST_SHOWN = 80
"""Characters of a value or a name in a message: whoever wrote a longer one finds it by its beginning."""

MOST_COMPARED = 120
"""Characters of a value that is shown beside another one, for what differs in it."""

EXIT_FAILED = 1
"""An error that may be gone at the next attempt, or that nobody foresaw."""

EXIT_USAGE = 2
"""What ``argparse`` ends with: options that a command does not have."""

EXIT_INCOMPLETE = 3
"""Done, but bad records of the input were left out, as was asked for, or what was to be left out is not
there."""

EXIT_HANG = 75
"""``EX_TEMPFAIL`` of sysexits.h: some process did not answer; trying again may help."""

EXIT_REFUSED = 78
"""``EX_CONFIG`` of sysexits.h: until somebody changes something, the same command ends the same way."""

EXIT_UNREAD = 128 + signal.SIGPIPE
"""Nobody reads the output any more; as a shell has it."""

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Ctrl-C."""


class UserError(ValueError):
    """Bad input. The message names the file, line or key and the way out; no traceback is shown."""

    exit_code = EXIT_REFUSED

    known_to_all = False
    """Whether all ranks end with it, so that one may tell for all."""


class TryAgain(UserError):
    """Trouble from outside that may be gone at the next attempt: a disk, the network, another process."""

    exit_code = EXIT_FAILED


class AgreedProblem(UserError):
    """What all ranks know of between two steps: their state is whole, and can still be saved.

    Args:
        message: of all ranks that have a problem.
        exit_code: that of the worst one.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RankError(TryAgain):
    """What one rank found and the others do not know: it prints the message itself.

    Args:
        message: names the rank.
        exit_code: None for that of the class.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class RankHang(RankError):
    """Another process did not answer in time."""

    exit_code = EXIT_HANG


def shown(value: object) -> str:
    """A value for a message: on one line, cut where it is long."""
    text = value[: MOST_SHOWN + 1] if isinstance(value, (str, bytes)) else value
    return _cut(repr(text))


def named(name: object) -> str:
    """A key or a path for a message: as it is, but on one line, and cut where it is long."""
    text = str(name)
    return _cut(text) if text[: MOST_SHOWN + 1].isprintable() else shown(text)


def differing_parts(first: str, second: str) -> tuple[str, str]:
    """Two texts for one message: of what is longer than ``MOST_COMPARED``, the part where they first
    differ."""
    pairs = enumerate(zip(first, second, strict=False))
    at = next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
    start = max(0, at - MOST_COMPARED // 3)
    return _part(first, start), _part(second, start)


def _part(text: str, start: int) -> str:
    if len(text) <= MOST_COMPARED:
        return text
    end = start + MOST_COMPARED
    return f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was made of, as a traceback would show them: the last one raised first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."
