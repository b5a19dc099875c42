"""Trains a byte-level BPE tokenizer on text and writes it as a folder."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from megatron_lpa.command_line import command, tool_parser
from megatron_lpa.preparation.bpe import train_tokenizer

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__, allow_abbrev=True)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl or .json lines (plain, .gz, .zst), .txt files, folders or globs of them",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to create")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, 257 or more (default: 4096)")
    parser.add_argument("--json-key", default="text", metavar="KEY")
    return parser.parse_args(argv)


@command()
def main(argv: Sequence[str]) -> int:
    """Train; 0."""
    arguments = parse_arguments(argv)
    size = train_tokenizer(arguments.input, arguments.vocab_size, arguments.output, arguments.json_key)
    print(f"{arguments.output}: {size} tokens")
    if size < arguments.vocab_size:
        logger.info(
            f"note: the text gave only {size} of {arguments.vocab_size} tokens; set model.vocab_size to it"
        )
    return 0
