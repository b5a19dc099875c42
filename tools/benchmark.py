#!/usr/bin/env python
"""Measures this machine: ``python tools/benchmark.py SUB-COMMAND --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

from benchmarks import (
    checkpoint,
    data_index,
    evaluate_step,
    gpu_suite,
    kernel,
    kernel_tune,
    loss,
    one_process,
    preprocess,
    preprocess_memory,
    step_profile,
    train_step,
)
from megatron_lpa.command_line import command, run_tool

COMMANDS = {
    "preprocess": preprocess,
    "preprocess-memory": preprocess_memory,
    "data-index": data_index,
    "checkpoint": checkpoint,
    "loss": loss,
    "kernel": kernel,
    "tune": kernel_tune,
    "train-step": train_step,
    "one-process": one_process,
    "evaluate-step": evaluate_step,
    "profile": step_profile,
    "gpu-suite": gpu_suite,
}


@command()
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="SUB-COMMAND", required=True)
    for name, module in COMMANDS.items():
        sub_command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub_command)
        sub_command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
