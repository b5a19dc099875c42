#!/usr/bin/env python
"""Tokenizes text into Megatron .bin/.idx files: ``<output-prefix>_<key>_document.{bin,idx,json}``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from megatron_lpa.data.preprocess import PreprocessConfig, preprocess
from megatron_lpa.errors import UserError

_SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "Llama2Tokenizer")


def usable_cores() -> int:
    """Cores this process may use: under a job scheduler often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    text = parser.add_argument_group("input")
    text.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl or .json lines (plain, .gz, .zst), .txt files (a document each), their folders or globs",
    )
    text.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="one dataset per key")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="folder, tokenizer.json, SentencePiece .model, or a name on the Hugging Face hub",
    )
    tokenizer.add_argument(
        "--tokenizer-type",
        choices=["HuggingFaceTokenizer", *_SENTENCEPIECE_TYPES],
        help="Megatron's way to say the kind of --tokenizer-model; no beginning-of-sequence token is added",
    )
    tokenizer.add_argument("--tokenizer-model", metavar="PATH", help="Megatron's name for --tokenizer")
    tokenizer.add_argument("--append-eod", action="store_true", help="end documents with the end token")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, metavar="PATH")
    output.add_argument("--overwrite", action="store_true", help="replace existing output")
    output.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="tokenizing processes (default: all cores); the output does not depend on it",
    )
    output.add_argument(
        "--log-interval", type=int, default=10_000, help="documents between progress lines; 0 for none"
    )
    return parser.parse_args()


def chosen_tokenizer(arguments: argparse.Namespace) -> str:
    """The tokenizer's name or path from our option or from Megatron's two."""
    if (arguments.tokenizer is None) == (arguments.tokenizer_model is None):
        raise UserError("give the tokenizer once: --tokenizer, or Megatron's --tokenizer-model")
    if arguments.tokenizer is not None:
        if arguments.tokenizer_type is not None:
            raise UserError("--tokenizer-type goes with --tokenizer-model; --tokenizer finds the kind itself")
        return arguments.tokenizer
    path = Path(arguments.tokenizer_model)
    if arguments.tokenizer_type in _SENTENCEPIECE_TYPES:
        path = path / "tokenizer.model" if path.is_dir() else path
        if ".model" not in path.suffixes or not path.is_file():
            raise UserError(
                f"{path}: --tokenizer-type {arguments.tokenizer_type} needs a SentencePiece .model file"
            )
        return str(path)
    if arguments.tokenizer_type == "HuggingFaceTokenizer" and (
        ".model" in path.suffixes or (path.is_dir() and not (path / "tokenizer.json").is_file())
    ):
        raise UserError(f"{path}: --tokenizer-type HuggingFaceTokenizer needs a tokenizer.json or its folder")
    return arguments.tokenizer_model


def main() -> int:
    arguments = parse_arguments()
    # A polite kill unwinds the stack, which removes unfinished files and ends the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        manifests = preprocess(
            PreprocessConfig(
                inputs=tuple(arguments.input),
                output_prefix=arguments.output_prefix,
                tokenizer=chosen_tokenizer(arguments),
                json_keys=tuple(arguments.json_keys),
                append_eod=arguments.append_eod,
                workers=arguments.workers,
                log_interval=arguments.log_interval,
                overwrite=arguments.overwrite,
            )
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing written", file=sys.stderr)
        return 130
    for prefix, manifest in manifests.items():
        print(
            f"{prefix}: {manifest['documents']} documents, {manifest['tokens']} tokens "
            f"({manifest['dtype']}), {manifest['empty_documents']} empty documents left out"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
