"""Tokenizes text into Megatron .bin/.idx files: ``<output-prefix>_<key>_document.{bin,idx,json}``.

Killed or interrupted, the same call goes on where it was. Exit code 3 means that the outputs are complete
but bad records were left out (``--on-bad-line skip``), or a subset to keep or drop was never seen.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_lpa.command_line import command, end_politely, tool_parser
from megatron_lpa.errors import EXIT_INCOMPLETE, UserError
from megatron_lpa.files import exists, is_dir
from megatron_lpa.preparation.documents import PILE_SUBSET
from megatron_lpa.preparation.preprocess import missing_subsets, preprocess
from megatron_lpa.preparation.preprocess_config import PreprocessConfig, reject_path
from megatron_lpa.preparation.shards import merge_if_last

logger = logging.getLogger(__name__)

_SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "Llama2Tokenizer")


def usable_cores() -> int:
    """Cores this process may use: under a job scheduler often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__, allow_abbrev=True)
    text = parser.add_argument_group("input")
    text.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help=".jsonl or .json lines (plain, .gz, .zst), .parquet, .txt files (a document each), "
        "their folders or globs",
    )
    text.add_argument(
        "--dataset", metavar="NAME", help="instead: a dataset on the Hugging Face hub, or a folder of one"
    )
    text.add_argument("--dataset-config", metavar="NAME", help="its configuration, where it has several")
    text.add_argument("--dataset-split", default="train", metavar="NAME", help="its split (default: train)")
    text.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="one dataset per key")
    text.add_argument(
        "--subset-key",
        default=PILE_SUBSET,
        metavar="KEY",
        help="where records name their subset, for the counts and the two options below "
        "(default: %(default)s)",
    )
    text.add_argument("--keep-subsets", nargs="+", default=[], metavar="NAME", help="leave out all others")
    text.add_argument("--drop-subsets", nargs="+", default=[], metavar="NAME", help="leave these out")
    text.add_argument(
        "--on-bad-line",
        choices=["error", "skip"],
        default="error",
        help="skip writes bad records to <output-prefix>.rejected.jsonl and ends with exit code 3",
    )
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="folder, tokenizer.json, SentencePiece .model, .tiktoken ranks, "
        "or a name on the Hugging Face hub",
    )
    tokenizer.add_argument(
        "--tokenizer-type",
        choices=["HuggingFaceTokenizer", *_SENTENCEPIECE_TYPES],
        help="Megatron's way to say the kind of --tokenizer-model; no beginning-of-sequence token is added",
    )
    tokenizer.add_argument("--tokenizer-model", metavar="PATH", help="Megatron's name for --tokenizer")
    tokenizer.add_argument(
        "--engine",
        choices=["auto", "reference"],
        default="auto",
        help="auto uses a fast engine where it gives the same ids",
    )
    tokenizer.add_argument("--append-eod", action="store_true", help="end documents with the end token")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, metavar="PATH")
    output.add_argument("--overwrite", action="store_true", help="replace existing output")
    output.add_argument(
        "--restart", action="store_true", help="discard what an unfinished run left, instead of going on"
    )
    output.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="do part I of N of the input files, from 0; tools/merge_datasets.py joins the parts",
    )
    output.add_argument(
        "--merge", action="store_true", help="with --shard: whoever completes the last shard joins them all"
    )
    output.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="tokenizing processes (default: all cores); the output does not depend on it",
    )
    output.add_argument(
        "--commit-interval",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how much work a kill may cost (default: 10)",
    )
    output.add_argument(
        "--log-interval", type=int, default=10_000, help="documents between progress lines; 0 for none"
    )
    return parser.parse_args(argv)


def parse_shard(text: str) -> tuple[int, int]:
    """``"3/30"`` to ``(3, 30)``."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, as 0/30")
    return int(match[1]), int(match[2])


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
        path = path / "tokenizer.model" if is_dir(path) else path
        if ".model" not in path.suffixes or not exists(path):
            raise UserError(
                f"{path}: --tokenizer-type {arguments.tokenizer_type} needs a SentencePiece .model file"
            )
        return str(path)
    if arguments.tokenizer_type == "HuggingFaceTokenizer" and (
        ".model" in path.suffixes or (is_dir(path) and not exists(path / "tokenizer.json"))
    ):
        raise UserError(f"{path}: --tokenizer-type HuggingFaceTokenizer needs a tokenizer.json or its folder")
    return arguments.tokenizer_model


@command("interrupted; the same call goes on where this one was")
def main(argv: Sequence[str]) -> int:
    """Tokenize; 0, or 3 if records were left out."""
    arguments = parse_arguments(argv)
    # A polite kill unwinds the stack, which records what was done and ends the workers.
    end_politely()
    config = PreprocessConfig(
        output_prefix=arguments.output_prefix,
        tokenizer=chosen_tokenizer(arguments),
        inputs=tuple(arguments.input),
        dataset=arguments.dataset,
        dataset_config=arguments.dataset_config,
        dataset_split=arguments.dataset_split,
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        engine=arguments.engine,
        subset_key=arguments.subset_key,
        keep_subsets=tuple(arguments.keep_subsets),
        drop_subsets=tuple(arguments.drop_subsets),
        on_bad_line=arguments.on_bad_line,
        shard=arguments.shard,
        workers=arguments.workers,
        log_interval=arguments.log_interval,
        commit_interval_s=arguments.commit_interval,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
    )
    if arguments.merge and config.shard is None:
        raise UserError("--merge joins shards; give --shard too, or leave it out")
    manifests = preprocess(config)
    merged = merge_if_last(config) if arguments.merge else {}
    if isinstance(merged, dict):
        manifests |= merged
    for prefix, manifest in manifests.items():
        print(
            f"{prefix}: {manifest.documents} documents, {manifest.tokens} tokens ({manifest.dtype}), "
            f"{manifest.empty_documents} empty documents left out"
            + (f", {manifest.dropped_documents} dropped by subset" if manifest.dropped_documents else "")
        )
    if isinstance(merged, str):
        print(f"not merged: {merged}")
    rejected = max(manifest.rejected_documents for manifest in manifests.values())
    if rejected:
        where = reject_path(
            config.output_prefix if config.shard is None else f"{config.output_prefix}.shard-*"
        )
        logger.warning(f"{rejected} bad records left out; see {where}")
    return EXIT_INCOMPLETE if rejected or (config.shard is None and missing_subsets(config, manifests)) else 0
