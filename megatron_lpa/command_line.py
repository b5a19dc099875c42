"""What the commands of ``tools/`` and the entry point share: how they end, and how they take run folders.

Who reads a command may go first: ``| head`` closes the pipe, a closed terminal takes what is written as an
error. A tool then ends without a word. Training goes on without its output: the run folder has the record.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import glob
import io
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TextIO, cast

from megatron_lpa.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNREAD, UserError, shown
from megatron_lpa.files import exists, is_dir
from megatron_lpa.run_folder import CHECKPOINTS, CONFIG, MANIFEST, METRICS

logger = logging.getLogger(__name__)

CONSOLE = "megatron-lpa"
"""The console command, whose sub-commands are those of ``tools/``."""

_NOBODY_READS = (errno.EPIPE, errno.EIO)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of an open file, which has no name for the system any more: these are as a rule of the output."""

_RUN_FILES = (CONFIG, METRICS, CHECKPOINTS, MANIFEST)
"""Any of these makes a folder one of a run, or of a checkpoint."""


class _Lines(logging.Handler):
    """A line on stderr per record: ``warning: ...``, ``error: ...``, and others as they are.

    That is stderr at the time, which ``outlive_readers`` replaces. An error of writing is its caller's, as of
    ``print``.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write it at once."""
        beginning = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{beginning}{record.getMessage()}", file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """For commands: what this package logs, from notes and progress up, goes to stderr, and nowhere else.

    Who imports the package sets up logging as for any other one.
    """
    package = logging.getLogger("megatron_lpa")
    package.handlers[:] = [_Lines()]
    package.setLevel(logging.INFO)
    package.propagate = False


Main = Callable[[Sequence[str]], int]


def command(interrupted: str = "interrupted") -> Callable[[Main], Main]:
    """Makes a function of options to an exit code the ``main`` of a command.

    What the user can mend is a line, and the exit code of its class (``errors.py``); Ctrl-C is a line and
    130.

    Args:
        interrupted: that line.
    """

    def made(main: Main) -> Main:
        @functools.wraps(main)
        def ended(argv: Sequence[str]) -> int:
            try:
                return main(argv)
            except UserError as error:
                logger.error(error)
                return error.exit_code
            except KeyboardInterrupt:
                logger.info(interrupted)
                return EXIT_INTERRUPTED

        return ended

    return made


def run_tool(main: Callable[[], int]) -> int:
    """The exit code of a command: that of ``main``, or of how it was ended.

    What the package logs goes to stderr. 141 where nobody reads what it prints any more, 130 for Ctrl-C, 1
    with one line where its output cannot be written. What a terminal or a file cannot show is written as an
    escape.
    """
    log_to_stderr()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            # Here, and not when the interpreter ends, whose error would be a traceback.
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except OSError as error:
        if error.errno in _NOBODY_READS and _silence_unread():
            return EXIT_UNREAD
        if error.filename is not None or error.errno not in _NO_ROOM:
            raise
        _silence(sys.stdout)
        logger.error(f"what this command prints cannot be written ({error.strerror})")
        return EXIT_FAILED
    except KeyboardInterrupt:
        logger.info("interrupted")
        return EXIT_INTERRUPTED


def tool_parser(text: str | None, *, allow_abbrev: bool = False, **options: Any) -> argparse.ArgumentParser:
    """A parser whose help is a command's text.

    Args:
        text: with examples as ``python tools/NAME.py``, which the console command shows as calls of its own.
        allow_abbrev: whether the beginning of an option will do.
        options: more of ``argparse.ArgumentParser``.
    """
    if sys.argv[0].startswith(f"{CONSOLE} "):
        text, options = _of_console(text), {key: _of_console(value) for key, value in options.items()}
    return argparse.ArgumentParser(
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
        **options,
    )


def _of_console(text: str | None) -> str:
    return re.sub(r"python tools/(\w+)\.py", rf"{CONSOLE} \1", text or "")


def end_politely() -> None:
    """Let SIGTERM and a closed terminal unwind the stack, which removes what is unfinished. ``nohup`` keeps
    its meaning."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda number, _frame: sys.exit(128 + number))


def _silence_unread() -> bool:
    """Let output that nobody can read any more go nowhere; whether there was such output."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                found |= _silence(stream)
    return found


def _silence(stream: TextIO | None) -> bool:
    if stream is None:
        return False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return True
    return False


class _Lasting(io.FileIO):
    """Output that is dropped once nobody can read it."""

    dropped_at: ClassVar[tuple[int, ...]] = _NOBODY_READS

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self.dropped_at:
                raise
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Make this process's output one that it can lose: a run goes on, and saves, when its terminal or ``tee``
    is gone, or where it was started without output.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (for the whole process)
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            raw = io.BufferedWriter(cast(io.RawIOBase, _Lasting(descriptor, "w", closefd=False)))
            replaced = io.TextIOWrapper(
                raw, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
            )
            setattr(sys, name, replaced)


def outlive_full_disks() -> None:
    """From here on the output is no reason to end, either, when the disk of a log is full: a run has its own
    record."""
    _Lasting.dropped_at = (*_NOBODY_READS, *_NO_ROOM)


def take_runs(parser: argparse.ArgumentParser, what: str = "run folders") -> None:
    """Give a command the option ``--run``, for ``run_folders``: several folders after it, and several
    times."""
    parser.add_argument(
        "--run",
        nargs="+",
        action="append",
        required=True,
        metavar="FOLDER",
        help=f"{what}, or patterns in quotes",
    )


def labels_of(folders: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    """A name for each run: those of ``--labels``, or of the folders.

    Raises:
        UserError: more or fewer names than runs.
    """
    if labels is None:
        return [folder.resolve().name for folder in folders]
    if len(labels) != len(folders):
        raise UserError(f"--labels has {len(labels)} names for {len(folders)} runs; give one per run")
    return list(labels)


def run_folders(given: Iterable[str | Sequence[str]], option: str = "--run") -> list[Path]:
    """The run folders that an option names: one or several after each use of it, or patterns in quotes.

    Args:
        given: the option's values, or a list of them for each time that it was given.
        option: for messages.

    Returns:
        In the order given; what a pattern fits in natural order (2 before 10), each folder once. A pattern
        fits only folders of runs and of checkpoints.

    Raises:
        UserError: a pattern fits no run folder.
    """
    found: list[Path] = []
    for names in given:
        for name in [names] if isinstance(names, str) else names:
            if not glob.has_magic(name) or exists(name):
                found.append(Path(name))
                continue
            fitting = [Path(path) for path in sorted(glob.glob(name), key=natural_key) if _is_run(path)]
            if not fitting:
                raise UserError(f"{option} {shown(name)}: no run folder fits this pattern")
            found += [path for path in fitting if path not in found]
    return found


def _is_run(path: str) -> bool:
    return is_dir(path) and any(exists(os.path.join(path, name)) for name in _RUN_FILES)


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Sorts ``pile.2`` before ``pile.10``."""
    parts: list[str | int] = [
        int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", text))
    ]
    return parts, text
