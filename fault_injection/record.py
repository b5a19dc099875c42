"""The record of a campaign: sums by kind, tables, and parts put together."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, versions_of
from fault_injection.kinds import RESTARTED, SHARES
from fault_injection.one_start import Result
from fault_injection.scenario import Going
from megatron_lpa.errors import UserError
from megatron_lpa.files import read_json

ROOT = Path(__file__).resolve().parents[1]
Outcome = dict[str, Any]
"""What became of a scenario: ``scenario``, as the record lists it, and ``faults``, the same."""

Record = dict[str, Any]


def commit_of(root: Path) -> str:
    """The commit that is checked out, with a hash of what differs from it; "unknown" where that cannot be
    told."""

    def said(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, check=True).stdout

    try:
        commit, difference = said("rev-parse", "HEAD").decode().strip(), said("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+{hashlib.sha256(difference).hexdigest()[:12]}" if difference else commit


def outcome_of(going: Going, results: Iterable[Result]) -> Outcome:
    """A scenario that has been gone through, as the record has it."""
    return {
        "scenario": {
            "number": going.scenario.number,
            "description": str(going.scenario),
            "on_checkpoint_failure": going.scenario.on_failure,
            "steps": going.scenario.steps,
            "starts": going.starts,
            "runs": going.runs,
            "compile_locks_left_by_kills": going.compile_locks,
            "full_disk": going.disk_kind,
            "violations": going.violations,
        },
        "faults": [_described(result) for result in results],
    }


def _described(result: Result) -> dict[str, Any]:
    fault = {key: value for key, value in asdict(result.fault).items() if value or key == "rank"}
    return {
        **fault,
        "scenario": result.scenario,
        "after_step": result.step,
        "codes": result.codes,
        "steps_lost": result.steps_lost,
        "seconds_to_recover": round(result.recovered_s or 0.0, 2),
        "violations": result.violations,
    }


def count_violations(outcomes: Sequence[Outcome]) -> int:
    """Promises broken, by faults and by runs as a whole."""
    of_runs = sum(len(outcome["scenario"]["violations"]) for outcome in outcomes)
    return of_runs + sum(len(fault["violations"]) for fault in _faults(outcomes))


def _faults(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [fault for outcome in outcomes for fault in outcome["faults"]]


def by_kind(faults: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sums over the faults of each kind."""
    rows = {}
    for kind in SHARES:
        own = [fault for fault in faults if fault["kind"] == kind]
        if not own:
            continue
        seconds = [fault["seconds_to_recover"] for fault in own]
        rows[kind] = {
            "faults": len(own),
            "restarts": sum(
                kind in RESTARTED or (kind == "disk-full" and any(fault["codes"])) for fault in own
            ),
            "steps_lost": sum(fault["steps_lost"] for fault in own),
            "most_steps_lost": max(fault["steps_lost"] for fault in own),
            "median_seconds_to_recover": round(statistics.median(seconds), 2),
            "most_seconds_to_recover": round(max(seconds), 2),
            "violations": sum(len(fault["violations"]) for fault in own),
        }
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line of Markdown per kind.

    Args:
        rows: as ``by_kind`` gives them.
    """
    lines = [
        "| kind | faults | most steps lost | seconds to recover, median / most |",
        "|---|---|---|---|",
    ]
    for kind, row in rows.items():
        broken = f" ({row['violations']} violations)" if row["violations"] else ""
        lines.append(
            f"| {kind}{broken} | {row['faults']} | {row['most_steps_lost']} | "
            f"{row['median_seconds_to_recover']:.1f} / {row['most_seconds_to_recover']:.1f} |"
        )
    return "\n".join(lines)


def make_record(
    options: Mapping[str, Any], part: Sequence[int], jobs: int, outcomes: Sequence[Outcome], seconds: float
) -> Record:
    """The record of one part of a plan.

    Args:
        options: what the plan follows from, and how processes are started.
        part: which of how many.
        jobs: scenarios at a time.
        outcomes: of its scenarios.
        seconds: that it took.
    """
    described = {
        "part": list(part),
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "machine": describe_machine(),
        "versions": versions_of(["torch", "deepspeed", "numpy", "safetensors"]),
    }
    return _with_sums(options, commit_of(ROOT), [described], outcomes)


def _with_sums(
    options: Mapping[str, Any],
    commit: str,
    parts: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
) -> Record:
    scenarios = [outcome["scenario"] for outcome in outcomes]
    faults = _faults(outcomes)
    return {
        "tool": "tools/chaos.py",
        "options": dict(options),
        "commit": commit,
        "parts": list(parts),
        "processes": "interpreters"
        if options["fresh"]
        else "forked from one that has imported torch and DeepSpeed",
        "full_disk": sorted({scenario["full_disk"] for scenario in scenarios} - {""}),
        "faults": len(faults),
        "starts": sum(scenario["starts"] for scenario in scenarios),
        "compile_locks_left_by_kills": sum(s["compile_locks_left_by_kills"] for s in scenarios),
        "runs": sum(scenario["runs"] for scenario in scenarios),
        "seconds": round(sum(part["seconds"] for part in parts), 1),
        "violations": count_violations(outcomes),
        "kinds": by_kind(faults),
        "scenarios": scenarios,
        "list": faults,
    }


def merged(paths: Sequence[Path]) -> Record:
    """One record of all parts of a plan.

    Raises:
        UserError: a file is no record, or they are not the parts of one plan at one commit, each once.
    """
    records = [_read(path) for path in paths]
    first = records[0]
    for path, record in zip(paths[1:], records[1:], strict=True):
        for key in ("options", "commit"):
            if record[key] != first[key]:
                raise UserError(
                    f"{path}: {key} {_short(record[key])}, but {paths[0]} has {_short(first[key])}; run its "
                    "part again, or leave it out"
                )
    parts = [part for record in records for part in record["parts"]]
    count = parts[0]["part"][1]
    numbers = [number for number, of in (part["part"] for part in parts) if of == count]
    if sorted(numbers) != list(range(1, count + 1)) or len(numbers) != len(parts):
        told = ", ".join(f"{number}/{of}" for number, of in (part["part"] for part in parts))
        raise UserError(f"parts {told}: not each of {count} once; give every part of one plan")
    scenarios = sorted((s for record in records for s in record["scenarios"]), key=lambda s: int(s["number"]))
    faults = sorted((f for record in records for f in record["list"]), key=lambda f: int(f["number"]))
    outcomes = [
        {"scenario": s, "faults": [f for f in faults if f["scenario"] == s["number"]]} for s in scenarios
    ]
    parts.sort(key=lambda part: int(part["part"][0]))
    return _with_sums(first["options"], first["commit"], parts, outcomes)


def _read(path: Path) -> Record:
    try:
        record = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    wanted = {"options", "commit", "parts", "scenarios", "list"}
    if not isinstance(record, dict) or not wanted <= record.keys() or not record["parts"]:
        raise UserError(f"{path}: not a record of tools/chaos.py; give what its --output wrote")
    return record


def _short(value: object) -> str:
    return json.dumps(value)[:120]
