"""The console command: ``megatron-lpa NAME ...``, also ``python -m megatron_lpa NAME ...``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys

from megatron_lpa import __version__
from megatron_lpa.command_line import CONSOLE, run_tool

COMMANDS = {
    "pretrain": "train a model; several processes: deepspeed --module megatron_lpa.pretrain",
    "train_tokenizer": "train a byte-level BPE tokenizer on text",
    "preprocess_data": "tokenize text into a dataset for training",
    "merge_datasets": "merge token datasets into one",
    "inspect_dataset": "say what a token dataset holds, show documents, find damage",
    "plan": "parameters, FLOPs, memory and traffic of a run, before it runs",
    "run_status": "whether a run is complete",
    "evaluate": "loss, perplexity and bits per byte of a trained run",
    "generate": "continue prompts with a trained run",
    "report": "compare runs: a Markdown report with a plot",
    "plot_curves": "plot losses by tokens and time",
    "convert_checkpoint": "rewrite a checkpoint for another layout, or as DeepSpeed's universal folder",
}

EPILOG = """\
A hyphen may stand for an underscore. `megatron-lpa COMMAND --help` says more.

Only a checkout has, as tools/NAME.py: demo, benchmark and chaos, which run code that is not installed, and
snapshot_run and health_check, which the job scripts in slurm/ call."""


def main() -> int:
    """Run a command; its exit code. Without one, or with one that is none: 2, as for any wrong usage."""
    given = sys.argv[1:]
    parser = argparse.ArgumentParser(
        prog=CONSOLE,
        usage=f"{CONSOLE} COMMAND ...",
        description=(
            "Pretraining of language models with low-dimensional projected attention (LPA).\n\ncommands:\n"
        )
        + "\n".join(f"  {name:<20}{line}" for name, line in COMMANDS.items()),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{CONSOLE} {__version__}")
    parser.add_argument("command", metavar="COMMAND", type=_known, help="one of the above")
    name = parser.parse_args(given[:1]).command
    # Who writes usage lines and examples finds the command there.
    sys.argv = [f"{CONSOLE} {name}", *given[1:]]
    # Only that one: others would load PyTorch, which takes seconds.
    if name == "pretrain":
        importlib.import_module("megatron_lpa.pretrain").run(given[1:])
    code: int = importlib.import_module(f"megatron_lpa.commands.{name}").main(given[1:])
    return code


def _known(given: str) -> str:
    if (name := given.replace("-", "_")) in COMMANDS:
        return name
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    raise argparse.ArgumentTypeError(f"no command {given!r}" + (f"; did you mean {near[0]}?" if near else ""))


def console() -> int:
    """What is installed as ``megatron-lpa``."""
    return run_tool(main)


if __name__ == "__main__":
    sys.exit(console())
