"""Compares runs: size, speed, loss, and a few generated lines, as a Markdown report with a plot.

    python tools/report.py --run runs/tiny-transformer runs/tiny-lpa --output report

Writes report.md and loss.png into --output (default: the first run's folder) and prints the report.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_lpa.command_line import command, labels_of, run_folders, take_runs, tool_parser
from megatron_lpa.data.storage.partial_file import explained_write_errors
from megatron_lpa.errors import UserError
from megatron_lpa.evaluate.curves import figure_of, read_curve, save_png
from megatron_lpa.evaluate.generation import Sampling, generate_text
from megatron_lpa.evaluate.run_report import report_text, summarize
from megatron_lpa.evaluate.trained import load_run, required_tokenizer
from megatron_lpa.files import write_whole

logger = logging.getLogger(__name__)

PLOT = "loss.png"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    take_runs(parser)
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="one per run (default: folder names)")
    parser.add_argument("--output", metavar="FOLDER", help="default: the first run's folder")
    parser.add_argument("--prompt", action="append", default=[], help="let every run continue this text")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="per prompt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", metavar="PATH", help="for the prompts (default: each run's own)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="of the plot: mean of N records")
    return parser.parse_args(argv)


def write_report(arguments: argparse.Namespace) -> tuple[Path, str]:
    """Write report and plot; the report's path and text.

    Raises:
        UserError: a folder that is no run, bad records, or a run that cannot generate.
    """
    folders = run_folders(arguments.run)
    labels = labels_of(folders, arguments.labels)
    if arguments.smooth < 1:
        raise UserError(f"--smooth is {arguments.smooth}; give 1 or more")
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed
    )
    named = list(zip(folders, labels, strict=True))
    runs = [summarize(folder, label) for folder, label in named]
    figure = figure_of([read_curve(folder, label) for folder, label in named], smooth=arguments.smooth)
    samples = []
    for folder, label in named if arguments.prompt else ():
        run = load_run(folder, tokenizer=arguments.tokenizer)
        tokenizer = required_tokenizer(run)
        texts = [generate_text(run.decoder, tokenizer, p, sampling)[0] for p in arguments.prompt]
        samples.append((label, texts))
    output = folders[0] if arguments.output is None else Path(arguments.output)
    text = report_text(runs, PLOT, samples)
    save_png(figure, output / PLOT)
    with explained_write_errors(output):
        write_whole(output / "report.md", text)
    return output / "report.md", text


@command()
def main(argv: Sequence[str]) -> int:
    """Write and print the report; 0."""
    arguments = parse_arguments(argv)
    path, text = write_report(arguments)
    print(text)
    print(f"written to {path} and {path.with_name(PLOT)}")
    return 0
