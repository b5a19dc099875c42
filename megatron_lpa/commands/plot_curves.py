"""Plots the losses of runs by tokens and by training time, as a PNG.

    python tools/plot_curves.py --run runs/tiny-transformer runs/tiny-lpa --output loss.png
    python tools/plot_curves.py --run 'runs/rank-*' --labels "rank 32" "rank 64" --smooth 5 --x time

Lines are training losses, markers validation losses. Time is that of the training steps alone.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_lpa.command_line import command, labels_of, run_folders, take_runs, tool_parser
from megatron_lpa.errors import UserError
from megatron_lpa.evaluate.comparable import warn_of_tokenizers
from megatron_lpa.evaluate.curves import figure_of, read_curve, save_png

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    take_runs(parser)
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="one per run (default: folder names)")
    parser.add_argument("--output", required=True, metavar="FILE.png")
    parser.add_argument("--x", choices=["tokens", "time", "both"], default="both", help="default: both")
    parser.add_argument(
        "--smooth", type=int, default=1, metavar="N", help="mean of N neighbouring records (default: 1)"
    )
    parser.add_argument("--title", help="default: what is plotted")
    return parser.parse_args(argv)


def plot(arguments: argparse.Namespace) -> Path:
    """Draw and write; the path of the picture.

    Raises:
        UserError: bad records, options that do not fit, or a path that cannot be written.
    """
    folders = run_folders(arguments.run)
    labels = labels_of(folders, arguments.labels)
    if arguments.smooth < 1:
        raise UserError(f"--smooth is {arguments.smooth}; give 1 or more")
    output = Path(arguments.output)
    if output.suffix != ".png":
        raise UserError(f"--output {output}: only PNG is written; give a name that ends in .png")
    curves = [read_curve(folder, label) for folder, label in zip(folders, labels, strict=True)]
    if warning := warn_of_tokenizers(labels, folders):
        logger.warning(warning)
    save_png(figure_of(curves, arguments.x, arguments.smooth, arguments.title), output)
    return output


@command()
def main(argv: Sequence[str]) -> int:
    """Plot; 0."""
    arguments = parse_arguments(argv)
    print(plot(arguments))
    return 0
