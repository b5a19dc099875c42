"""Rewrites a checkpoint for a named layout, or as DeepSpeed's universal folder.

    python tools/convert_checkpoint.py runs/tiny-lpa --output moved/step_00000020 \\
        --tensor-parallel-size 4 --data-parallel-size 2
    python tools/convert_checkpoint.py runs/tiny-lpa --step 20 --output runs/tiny-universal --to universal

A run continues from its checkpoints in any layout: resuming needs no conversion. The source is compared with
its hashes before anything is written; the output appears whole or not at all, and never replaces anything.
One process, no GPU, no DeepSpeed. Exit code 0, 78 or 1 with a message, or 130, 143 and 129 after Ctrl-C,
SIGTERM and a closed terminal.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_lpa.command_line import command, end_politely, tool_parser
from megatron_lpa.config.run import EARLIER_LAYOUTS
from megatron_lpa.errors import UserError

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint folder, or a run folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="has to be new")
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint of a run; default: the newest that is intact"
    )
    parser.add_argument(
        "--to",
        choices=("native", "universal"),
        default="native",
        help="what to write: a checkpoint of this repository (the default), or DeepSpeed's universal folder",
    )
    for name in ("--tensor-parallel-size", "--data-parallel-size"):
        parser.add_argument(name, type=int, metavar="N", help="of the target; default: the source's")
    parser.add_argument(
        "--lowdim-layout",
        type=lambda name: EARLIER_LAYOUTS.get(name, name),
        choices=("column_row", "latent"),
        help="of the target; default: the source's",
    )
    parser.add_argument("--weights-dtype", choices=("bf16", "fp32"), help="default: the source's")
    return parser.parse_args(argv)


def converted(arguments: argparse.Namespace) -> str:
    """Do it; returns a summary.

    Raises:
        UserError: what the user can mend.
    """
    native_only = ("tensor_parallel_size", "data_parallel_size", "weights_dtype")
    for name in native_only:
        if arguments.to == "universal" and getattr(arguments, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} has no meaning with --to universal, whose tensors are whole and fp32")
    # Not before: they load PyTorch, which takes seconds that --help and a mistyped option need not wait for.
    from megatron_lpa.checkpoint.convert import TargetLayout, convert
    from megatron_lpa.checkpoint.convert_source import find_source
    from megatron_lpa.checkpoint.universal import write_universal

    started = time.perf_counter()
    source = find_source(arguments.source, arguments.step)
    for note in source.notes:
        logger.warning(note)
    if arguments.to == "universal":
        written = write_universal(source, arguments.output, arguments.lowdim_layout)
        what = "DeepSpeed's universal checkpoint"
    else:
        own = TargetLayout.of(source)
        layout = TargetLayout(
            own.tp_size if arguments.tensor_parallel_size is None else arguments.tensor_parallel_size,
            own.dp_size if arguments.data_parallel_size is None else arguments.data_parallel_size,
            arguments.lowdim_layout or own.lowdim_layout,
        )
        written = convert(source, arguments.output, layout, arguments.weights_dtype)
        what = f"tensor parallel {layout.tp_size}, data parallel {layout.dp_size}, {layout.lowdim_layout}"
    return (
        f"{written.folder}: step {source.progress.step} of {source.checkpoint} as {what}; {written.files} "
        f"files, {written.bytes:,} bytes, {time.perf_counter() - started:.1f} s"
    )


@command("interrupted; nothing was left behind")
def main(argv: Sequence[str]) -> int:
    """Convert; 0."""
    arguments = parse_arguments(argv)
    # A polite kill unwinds the stack, which removes what is unfinished.
    end_politely()
    print(converted(arguments))
    return 0
