"""All scenarios of a plan, lines while they go on, the table and the record at the end."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, versions_of
from fault_injection.disk import keep_mounts_to_ourselves
from fault_injection.plan import BETWEEN, ENDING, SHARES, Scenario, make_plan, short_plan
from fault_injection.processes import prepare
from fault_injection.runs import References
from fault_injection.scenario import Going
from fault_injection.start import Result


@dataclass(frozen=True)
class Options:
    """What ``tools/chaos.py`` was asked for; see its help."""

    plan: str = "long"
    faults: int = 200
    seed: int = 1
    scenarios: list[int] | None = None
    output: Path | None = None
    folder: Path | None = None
    keep: bool = False
    fresh: bool = False


def run_campaign(options: Options) -> int:
    """Go through a plan; 1 when a promise was broken."""
    plan = short_plan(options.seed) if options.plan == "short" else make_plan(options.seed, options.faults)
    count = sum(len(scenario.faults) for scenario in plan)
    if options.scenarios:
        plan = [scenario for scenario in plan if scenario.number in options.scenarios]
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos_", dir=options.folder)).resolve()
    began = time.monotonic()
    prepare(folder)
    keep_mounts_to_ourselves()
    references = References(folder, options.fresh)
    results: list[Result] = []
    gone: list[Going] = []

    def say(result: Result) -> None:
        if result.fault.number:
            results.append(result)
        _say(result, count)

    for scenario in plan:
        print(f"scenario {scenario.number}: {scenario}; {len(scenario.faults)} faults", flush=True)
        going = Going(scenario, folder / f"scenario_{scenario.number}", references, options.fresh, say)
        gone.append(going)
        try:
            going.go()
        except Exception as error:  # one scenario's failure is a finding; the others are worth having
            going.violations.append(f"the driver failed: {type(error).__name__}: {error}")
        for violation in going.violations:
            print(f"  VIOLATION {violation}", flush=True)
        if not going.violations and not options.keep and not _broken(results, scenario):
            shutil.rmtree(folder / f"scenario_{scenario.number}", ignore_errors=True)
    violations = sum(len(r.violations) for r in results) + sum(len(going.violations) for going in gone)
    seconds = time.monotonic() - began
    print()
    print(table(results))
    print(
        f"\n{len(results)} faults, {sum(g.starts for g in gone)} starts, {sum(g.runs for g in gone)} runs, "
        f"{seconds / 60:.1f} minutes, {violations} violations"
    )
    if options.output is not None:
        record = _record(options, results, gone, seconds, violations)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if options.keep or violations:
        print(f"runs and logs are in {folder}", flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if violations:
        print(
            f"error: {violations} promises were broken; see them again with --seed {options.seed} --faults "
            f"{options.faults} --plan {options.plan} and --scenario",
            file=sys.stderr,
        )
    return 1 if violations else 0


def _broken(results: list[Result], scenario: Scenario) -> bool:
    return any(result.violations for result in results if result.scenario == scenario.number)


def _say(result: Result, count: int) -> None:
    codes = (
        f"exit codes {' '.join(map(str, result.codes))}, "
        if result.fault.kind in (*ENDING, "disk-full")
        else ""
    )
    print(
        f"  {result.fault.number or '+':>3}/{count} {result.fault} after step {result.step}: {codes}"
        f"{result.steps_lost} steps lost, {result.recovered_s or 0.0:.1f} s",
        flush=True,
    )
    for violation in result.violations:
        print(f"      VIOLATION {violation}", flush=True)


def by_kind(results: list[Result]) -> dict[str, dict[str, Any]]:
    """Sums over the faults of each kind."""
    rows = {}
    for kind in SHARES:
        own = [result for result in results if result.fault.kind == kind]
        if not own:
            continue
        seconds = [result.recovered_s for result in own if result.recovered_s is not None]
        rows[kind] = {
            "faults": len(own),
            "restarts": sum(
                kind in ENDING or kind in BETWEEN or (kind == "disk-full" and any(result.codes))
                for result in own
            ),
            "steps_lost": sum(result.steps_lost for result in own),
            "most_steps_lost": max(result.steps_lost for result in own),
            "median_seconds_to_recover": round(statistics.median(seconds), 2) if seconds else None,
            "most_seconds_to_recover": round(max(seconds), 2) if seconds else None,
            "violations": sum(len(result.violations) for result in own),
        }
    return rows


def table(results: list[Result]) -> str:
    """A line per kind."""
    lines = [
        f"{'kind':<20}{'faults':>8}{'restarts':>10}{'steps lost':>12}{'most':>6}{'s to recover':>14}{'most':>7}"
        f"{'violations':>12}"
    ]
    for kind, row in by_kind(results).items():
        lines.append(
            f"{kind:<20}{row['faults']:>8}{row['restarts']:>10}{row['steps_lost']:>12}{row['most_steps_lost']:>6}"
            f"{row['median_seconds_to_recover'] or 0:>14.1f}{row['most_seconds_to_recover'] or 0:>7.1f}{row['violations']:>12}"
        )
    return "\n".join(lines)


def _record(
    options: Options, results: list[Result], gone: list[Going], seconds: float, violations: int
) -> dict[str, Any]:
    return {
        "tool": "tools/chaos.py",
        "options": {
            "plan": options.plan,
            "faults": options.faults,
            "seed": options.seed,
            "fresh": options.fresh,
        },
        "machine": describe_machine(),
        "versions": versions_of(["torch", "deepspeed", "numpy", "safetensors"]),
        "processes": "interpreters"
        if options.fresh
        else "forked from one that has imported torch and DeepSpeed",
        "full_disk": sorted({going.disk_kind for going in gone if going.disk_kind}),
        "faults": len(results),
        "starts": sum(going.starts for going in gone),
        "compile_locks_left_by_kills": sum(going.compile_locks for going in gone),
        "runs": sum(going.runs for going in gone),
        "seconds": round(seconds, 1),
        "violations": violations,
        "kinds": by_kind(results),
        "scenarios": [
            {
                "number": going.scenario.number,
                "description": str(going.scenario),
                "on_checkpoint_failure": going.scenario.on_failure,
                "steps": going.scenario.steps,
                "starts": going.starts,
                "runs": going.runs,
                "violations": going.violations,
            }
            for going in gone
        ],
        "list": [
            {
                **{
                    key: value for key, value in asdict(result.fault).items() if value not in ("", 0.0, False)
                },
                "scenario": result.scenario,
                "after_step": result.step,
                "codes": result.codes,
                "steps_lost": result.steps_lost,
                "seconds_to_recover": round(result.recovered_s or 0.0, 2),
                "violations": result.violations,
            }
            for result in results
        ],
    }
