"""Starts that have to be refused: whole ones of their own, with nothing to strike while they run."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_injection.checks import checkpoint_folders
from fault_injection.disk import damage
from fault_injection.fault_plan import Fault, Layout
from fault_injection.kinds import MISMATCHES
from fault_injection.launches import Ranks
from fault_injection.one_start import STARTING_GRACE_S, Result
from fault_injection.planting import error_lines, of_mismatch, of_planted, refusal, tree
from megatron_lpa.run_folder import CHECKPOINTS, LOCK, LOGS, STEP

UNWATCHED = (LOCK, LOGS)
"""What may change in a run folder when a start is refused."""

LIMIT_S = 30.0
"""A refusal takes a second or two; a collective that never comes, half an hour."""


@dataclass(frozen=True)
class Attempt:
    """A start that is over.

    Args:
        codes: exit codes, by rank; of those that were killed, -9.
        errors: what each rank wrote to stderr.
        seconds: that it took.
        trained: it came to a step, and was killed there.
    """

    codes: list[int]
    errors: list[str]
    seconds: float
    trained: bool


def attempt(arguments: list[str], specs: list[dict[str, Any]], cwd: Path, logs: Path, fresh: bool) -> Attempt:
    """Start, and wait until all have ended; kill all at the first step, or when the time is up.

    Args:
        arguments: of ``megatron_lpa.pretrain``.
        specs, cwd, logs, fresh: as ``Ranks``.
    """
    began, trained = time.monotonic(), False
    ranks = Ranks(arguments, specs, cwd, logs, fresh)
    try:
        while ranks.alive:
            trained |= any(event.content["event"] == "step" for event in ranks.events(0.02))
            ranks.end_survivors(STARTING_GRACE_S)
            if trained or time.monotonic() - began > LIMIT_S:
                ranks.kill_all()
    finally:
        ranks.close()
    codes = [ranks.codes[rank] for rank in range(len(specs))]
    return Attempt(codes, ranks.text("err"), time.monotonic() - began, trained)


def of_attempt(tried: Attempt) -> list[str]:
    """Violations of how any such start ended."""
    if tried.trained:
        return ["it trained where it had to be refused"]
    return refusal(tried.codes, tried.errors, tried.seconds, LIMIT_S)


def differing_specs(
    arguments: list[str], layout: Layout, rank: int, sort: str
) -> tuple[list[dict[str, Any]], str]:
    """What each rank is started with when one has another option, and that option's key.

    Args:
        arguments: of all ranks.
        layout: of the start.
        rank: that differs; not 0, with which it is compared.
        sort: of ``kinds.MISMATCHES``.
    """
    key, value = MISMATCHES[sort]
    if sort == "zero":
        value = "zero2" if layout.zero != 2 else "zero1"
    elif sort == "precision":
        value = "bf16" if layout.precision == "fp32" else "fp32"
    elif sort == "tensor-parallel":
        value = "1" if layout.tp > 1 else "2"
    specs: list[dict[str, Any]] = [{} for _ in range(layout.processes)]
    specs[rank]["arguments"] = [*arguments, f"--{key}", value]
    return specs, key


def with_pipe(arguments: list[str], what: str, data: Path, folder: Path) -> tuple[list[str], str]:
    """Options that lead to a named pipe, and its name.

    Args:
        arguments: without it.
        what: ``config`` or ``data-manifest``.
        data: folder of the data.
        folder: a new one, for the pipe.
    """
    folder.mkdir(parents=True)
    if what == "config":
        os.mkfifo(folder / "pipe.yaml")
        return [*arguments, "--config", str(folder / "pipe.yaml")], "pipe.yaml"
    for name in ("data.bin", "data.idx"):
        os.link(data / name, folder / name)
    os.mkfifo(folder / "data.json")
    return [*arguments, "--data.prefix", str(folder / "data")], "data.json"


def of_all_damaged(tried: Attempt) -> list[str]:
    """Violations of a start without a checkpoint that is whole."""
    lines = error_lines(tried.errors)
    if len(lines) != 1 or "holds no checkpoint that is intact" not in lines[0]:
        return [*of_attempt(tried), f"with all checkpoints damaged: {' | '.join(lines)[:300]!r}"]
    return of_attempt(tried)


class RefusedStart:
    """A start that has to be refused, and to change nothing in the run folder.

    Args:
        run: the run folder.
        layout: of the start.
        arguments: of a start that would be good.
        data: folder of the data.
        folder: for logs and what is needed meanwhile.
        fresh: as ``Ranks``.
    """

    def __init__(
        self, run: Path, layout: Layout, arguments: list[str], data: Path, folder: Path, fresh: bool
    ) -> None:
        self._run, self._layout, self._arguments = run, layout, arguments
        self._data, self._folder, self._fresh = data, folder, fresh

    def go(self, result: Result, name: str) -> None:
        """Bring the fault about, start, and see what comes of it.

        Args:
            result: of a fault of the kind ``rank-mismatch``, ``pipe`` or ``all-damaged``; codes and
                violations go there, and as ``recovered_s`` the seconds that it took to be refused.
            name: of the start, for its logs.
        """
        fault, logs = result.fault, self._folder / "logs" / name
        if fault.kind == "all-damaged":
            with self._all_damaged(fault):
                tried = self._attempt(result, self._arguments, self._same(), logs)
                result.violations += of_all_damaged(tried)
        elif fault.kind == "rank-mismatch":
            rank = max(1, fault.rank % self._layout.processes)
            specs, key = differing_specs(self._arguments, self._layout, rank, fault.variant)
            tried = self._attempt(result, self._arguments, specs, logs)
            result.violations += of_attempt(tried) + of_mismatch(tried.errors, rank, key)
        else:
            folder = self._folder / f"pipe_{fault.number}"
            arguments, pipe = with_pipe(self._arguments, fault.variant, self._data, folder)
            tried = self._attempt(result, arguments, self._same(), logs)
            result.violations += of_attempt(tried) + of_planted(tried.errors, pipe)

    def _tree(self, fault: Fault) -> dict[str, str]:
        """What must not change; a start that looks at checkpoints may first remove what kills have left of
        others."""
        found = tree(self._run, UNWATCHED)
        if fault.kind == "all-damaged":
            found = {
                name: what for name, what in found.items() if not name.startswith(f"{CHECKPOINTS}/.{STEP}")
            }
        return found

    def _same(self) -> list[dict[str, Any]]:
        return [{} for _ in range(self._layout.processes)]

    def _attempt(
        self, result: Result, arguments: list[str], specs: list[dict[str, Any]], logs: Path
    ) -> Attempt:
        before = self._tree(result.fault)
        tried = attempt(arguments, specs, self._data, logs, self._fresh)
        result.codes, result.recovered_s = tried.codes, tried.seconds
        if self._tree(result.fault) != before:
            result.violations.append("the run folder has changed")
        return tried

    @contextlib.contextmanager
    def _all_damaged(self, fault: Fault) -> Iterator[None]:
        checkpoints, copy = self._run / CHECKPOINTS, self._folder / "copy_of_checkpoints"
        shutil.copytree(checkpoints, copy)
        for number, folder in enumerate(checkpoint_folders(self._run)):
            damage(checkpoints, folder, ("truncated", "missing", "manifest-empty")[number % 3], fault.rank)
        yield
        shutil.rmtree(checkpoints)
        shutil.copytree(copy, checkpoints)
        shutil.rmtree(copy)
