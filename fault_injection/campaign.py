"""All scenarios of a plan, lines while they go on, the table and the record at the end."""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fault_injection.disk import keep_mounts_to_ourselves
from fault_injection.fault_plan import Scenario, make_plan, short_plan
from fault_injection.kinds import ENDING
from fault_injection.launches import die_with_parent, own_extensions, prepare
from fault_injection.one_start import Result
from fault_injection.record import Outcome, Record, count_violations, make_record, outcome_of, table
from fault_injection.runs import References
from fault_injection.scenario import Going
from megatron_lpa.files import write_whole


@dataclass(frozen=True)
class Options:
    """What ``tools/chaos.py`` was asked for; see its help."""

    plan: str = "long"
    faults: int = 200
    seed: int = 1
    part: tuple[int, int] = (1, 1)
    jobs: int = 1
    scenarios: list[int] | None = None
    output: Path | None = None
    folder: Path | None = None
    keep: bool = False
    fresh: bool = False


def run_campaign(options: Options) -> int:
    """Go through a plan, or a part of it; 1 when a promise was broken."""
    plan = short_plan(options.seed) if options.plan == "short" else make_plan(options.seed, options.faults)
    count = sum(len(scenario.faults) for scenario in plan)
    if options.scenarios:
        plan = [scenario for scenario in plan if scenario.number in options.scenarios]
    plan = plan[options.part[0] - 1 :: options.part[1]]
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos_", dir=options.folder)).resolve()
    began = time.monotonic()
    prepare(folder)
    keep_mounts_to_ourselves()
    references = References(folder, options.fresh)
    if options.jobs == 1:
        outcomes = [_gone(scenario, folder, references, options, count) for scenario in plan]
    else:
        outcomes = _side_by_side(plan, folder, references, options, count)
    drawn_from = {
        "plan": options.plan, "faults": options.faults, "seed": options.seed, "fresh": options.fresh,
        "scenarios": options.scenarios,
    }  # fmt: skip
    record = make_record(drawn_from, options.part, options.jobs, outcomes, time.monotonic() - began)
    conclude(record, options.output)
    broken = count_violations(outcomes)
    if options.keep or broken:
        print(f"runs and logs are in {folder}", flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if broken:
        print(
            f"error: {broken} promises were broken; see them again with --seed {options.seed} --faults "
            f"{options.faults} --plan {options.plan} and --scenario",
            file=sys.stderr,
        )
    return 1 if broken else 0


def conclude(record: Record, output: Path | None) -> None:
    """Print the table and the sums of a record, and write it where that is asked for."""
    print(f"\n{table(record['kinds'])}")
    print(
        f"\n{record['faults']} faults, {record['starts']} starts, {record['runs']} runs, "
        f"{record['seconds'] / 60:.1f} minutes, {record['violations']} violations"
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps(record, indent=1) + "\n")


def _gone(scenario: Scenario, folder: Path, references: References, options: Options, count: int) -> Outcome:
    """Go through one scenario, with lines about it."""
    results: list[Result] = []

    def say(result: Result) -> None:
        if result.fault.number:
            results.append(result)
        _say(result, count)

    print(f"scenario {scenario.number}: {scenario}; {len(scenario.faults)} faults", flush=True)
    own = folder / f"scenario_{scenario.number}"
    going = Going(scenario, own, references, options.fresh, say)
    try:
        going.go()
    except Exception as error:  # one scenario's failure is a finding; the others are worth having
        going.violations.append(f"the driver failed: {type(error).__name__}: {error}")
    for violation in going.violations:
        print(f"  {scenario.number}: VIOLATION {violation}", flush=True)
    outcome = outcome_of(going, results)
    if not options.keep and not count_violations([outcome]):
        shutil.rmtree(own, ignore_errors=True)
    return outcome


def _side_by_side(
    plan: list[Scenario], folder: Path, references: References, options: Options, count: int
) -> list[Outcome]:
    """Several scenarios at a time, each in a process that is forked from this one."""
    numbers = os.pipe()
    for index in range(len(plan)):
        os.write(numbers[1], index.to_bytes(4, "little"))
    os.close(numbers[1])
    links: list[BinaryIO] = []
    pids = []
    for worker in range(options.jobs):
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            _work(worker, numbers[0], theirs, plan, folder, references, options, count)
        os.close(theirs)
        links.append(open(ours, "rb"))  # noqa: SIM115 - closed below
        pids.append(pid)
    outcomes: dict[int, Outcome] = {}
    open_links = list(links)
    while open_links:
        for link in select.select(open_links, [], [])[0]:
            line = link.readline()
            if line:
                outcome = json.loads(line)
                outcomes[outcome["scenario"]["number"]] = outcome
            else:
                open_links.remove(link)
                link.close()
    for pid in pids:
        os.waitpid(pid, 0)
    missing = [scenario.number for scenario in plan if scenario.number not in outcomes]
    if missing:
        raise RuntimeError(f"a worker ended without a word about the scenarios {missing}")
    return [outcomes[scenario.number] for scenario in plan]


def _work(
    worker: int,
    numbers: int,
    link: int,
    plan: list[Scenario],
    folder: Path,
    references: References,
    options: Options,
    count: int,
) -> None:
    """Be one worker: take the next scenario until there is none, and send what became of each."""
    code = 1
    try:
        die_with_parent()
        own_extensions(folder / f"worker_{worker}")
        # One write of four bytes is one read of four bytes, whoever reads.
        while taken := os.read(numbers, 4):
            scenario = plan[int.from_bytes(taken, "little")]
            outcome = _gone(scenario, folder, references, options, count)
            with open(link, "wb", closefd=False) as file:
                file.write(json.dumps(outcome).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _say(result: Result, count: int) -> None:
    ended = result.fault.kind in (*ENDING, "disk-full")
    codes = f"exit codes {' '.join(map(str, result.codes))}, " if ended else ""
    print(
        f"  {result.scenario}: {result.fault.number or '+':>3}/{count} {result.fault} after step "
        f"{result.step}: {codes}{result.steps_lost} steps lost, {result.recovered_s or 0.0:.1f} s",
        flush=True,
    )
    for violation in result.violations:
        print(f"      {result.scenario}: VIOLATION {violation}", flush=True)
