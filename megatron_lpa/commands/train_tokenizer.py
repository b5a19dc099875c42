"""Trains a byte-level BPE tokenizer on text and writes it as a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_lpa.command_line import tool_parser
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.bpe import train_tokenizer


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


def main(argv: Sequence[str]) -> int:
    """Train; 0, or 1 with a message for what the user can mend."""
    arguments = parse_arguments(argv)
    try:
        size = train_tokenizer(arguments.input, arguments.vocab_size, arguments.output, arguments.json_key)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {size} tokens")
    if size < arguments.vocab_size:
        print(
            f"note: the text gave only {size} of {arguments.vocab_size} tokens; set model.vocab_size to it",
            file=sys.stderr,
        )
    return 0
