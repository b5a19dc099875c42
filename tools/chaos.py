#!/usr/bin/env python3
"""Throws faults at small training runs, and checks what docs/reliability.md promises.

    python tools/chaos.py --plan short                                  # a dozen faults, a minute
    python tools/chaos.py --faults 200 --seed 1 --output result.json    # half an hour

Runs of a tiny model in 1 to 4 processes on this machine's CPUs are killed (at random instants and inside saves),
stopped by signals, paused, cut off from their data and their disk, given gradients that are not numbers and clocks
that jump; their checkpoints are damaged between starts. After each fault the same command is started again, until the
run is complete. Then its losses and its final checkpoint have to be bit for bit those of a run that nothing disturbed.

Which faults come, and when, follows from --seed and --faults; the instants of random kills also depend on how fast the
machine is. A line is printed per fault, and a table at the end. The exit code is 1 when any promise was broken; the
folder with all runs and logs then stays, and is named.

Processes are forked from one that has imported everything, which saves seconds per start; --fresh starts interpreters.
The full disk is a small tmpfs where this user may mount one, else a writer that fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # fault_injection/ is not an installed package

from fault_injection.campaign import Options, run_campaign


def main(argv: list[str] | None = None) -> int:
    """0, or 1 when a promise was broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--plan", choices=("long", "short"), default="long", help="short ignores --faults")
    parser.add_argument("--faults", type=int, default=200, help="of the long plan (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the plan (default: 1)")
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
    if arguments.faults < 1:
        parser.error("--faults must be at least 1")
    options = Options(
        plan=arguments.plan,
        faults=arguments.faults,
        seed=arguments.seed,
        scenarios=arguments.scenario,
        output=arguments.output,
        folder=arguments.folder,
        keep=arguments.keep,
        fresh=arguments.fresh,
    )
    return run_campaign(options)


if __name__ == "__main__":
    sys.exit(main())
