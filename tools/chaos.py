#!/usr/bin/env python3
"""Throws faults at small training runs, and checks what docs/reliability.md promises.

    python tools/chaos.py --plan short                                  # a dozen faults, a minute
    python tools/chaos.py --faults 200 --jobs 2 --output result.json    # some minutes

Runs of a tiny model in 1 to 4 processes on this machine's CPUs are killed (at random instants and inside
saves), stopped by signals, paused, cut off from their data and their disk, given gradients that are not
numbers and clocks that jump; their checkpoints are damaged between starts, links and pipes are planted in
their folders, and single ranks are given other options. After each fault the same command is started again,
until the run is complete. Then its losses and its final checkpoint have to be bit for bit those of a run that
nothing disturbed.

Which faults come, and when, follows from --seed and --faults; the instants of random kills also depend on how
fast the machine is. A long plan can be gone through in parts, at other times or on other machines:

    python tools/chaos.py --faults 2000 --part 1/4 --output part1.json  # and so on
    python tools/chaos.py --merge part?.json --output result.json

A line is printed per fault, and a table at the end. The exit code is 1 when any promise was broken; the
folder with all runs and logs then stays, and is named.

Processes are forked from one that has imported everything, which saves seconds per start; --fresh starts
interpreters. A run pauses a tenth as long as else before it tries again to read.
The full disk is a small tmpfs where this user may mount one, else a writer that fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # fault_injection/ is not an installed package

from fault_injection.campaign import Options, conclude, run_campaign
from fault_injection.record import merged
from megatron_lpa.command_line import command, run_tool


@command()
def main(argv: Sequence[str]) -> int:
    """0, or 1 when a promise was broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--plan", choices=("long", "short"), default="long", help="short ignores --faults")
    parser.add_argument("--faults", type=int, default=200, help="of the long plan (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the plan (default: 1)")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="K/N", help="only the K-th of N parts")
    parser.add_argument("--jobs", type=int, default=1, help="scenarios at a time (default: 1)")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing; put the records of all parts together",
    )
    parser.add_argument(
        "--scenario", type=int, action="append", help="only this one of the plan; may be repeated"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the result as JSON")
    parser.add_argument(
        "--folder", type=Path, help="for runs and logs (default: a new one for temporary files)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder also when all went well")
    parser.add_argument("--fresh", action="store_true", help="start interpreters instead of forking (slow)")
    arguments = parser.parse_args(argv)
    if arguments.faults < 1 or arguments.jobs < 1:
        parser.error("--faults and --jobs must be at least 1")
    if arguments.merge:
        return _merge(arguments.merge, arguments.output)
    options = Options(
        plan=arguments.plan,
        faults=arguments.faults,
        seed=arguments.seed,
        part=arguments.part,
        jobs=arguments.jobs,
        scenarios=arguments.scenario,
        output=arguments.output,
        folder=arguments.folder,
        keep=arguments.keep,
        fresh=arguments.fresh,
    )
    return run_campaign(options)


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 1 <= K <= N, such as 3/8")
    return int(number), int(of)


def _merge(files: list[Path], output: Path | None) -> int:
    record = merged(files)
    conclude(record, output)
    return 1 if record["violations"] else 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
