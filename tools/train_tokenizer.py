#!/usr/bin/env python
"""Trains a byte-level BPE tokenizer on text and writes it as a folder."""

from __future__ import annotations

import argparse
import sys

from megatron_lpa.command_line import run_tool
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.train_tokenizer import train_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
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
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
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


if __name__ == "__main__":
    sys.exit(run_tool(main))
