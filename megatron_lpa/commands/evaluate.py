"""Loss, perplexity per token and per word, and bits per byte of a trained run on held-out or any other text.

    python tools/evaluate.py --run runs/tiny-lpa --split valid
    python tools/evaluate.py --run runs/tiny-lpa --data data/test_text_document
    python tools/evaluate.py --run runs/tiny-lpa --step 300 --text article.txt --stride 64
    python tools/evaluate.py --run runs/tiny-transformer runs/tiny-lpa --split test --json

Several runs are measured one after the other; with --json they are a list.


--split reads the documents that data.split, or data.valid_prefix and data.test_prefix, held out of the run's
own data, whose place its config.yaml records. --data reads a whole dataset, in the order of the file. It is
refused if another tokenizer made it, and a warning says so if the run was trained on it.

By default the windows are those of the training loop, so that the loss of a test set is the one in the
run's metrics.jsonl. With --stride the window slides, every token has context, and the loss is lower.
End-of-document tokens are predicted like any other; they count as no word and no byte.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_lpa.command_line import command, run_folders, take_runs, tool_parser
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.errors import UserError
from megatron_lpa.evaluate.held_out import DatasetTokens, check_tokenizer, split_streams, training_warnings
from megatron_lpa.evaluate.perplexity import TextLoss, TokenStream, ids_of_texts, measure, sum_of
from megatron_lpa.evaluate.trained import TrainedRun, load_run, required_tokenizer
from megatron_lpa.record_values import finite

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    take_runs(parser, "run folders or checkpoint folders")
    parser.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the one the run records")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--split", choices=("valid", "test"), help="held-out documents of the data that the run records"
    )
    source.add_argument("--data", metavar="PREFIX", help="tokenized dataset, without .bin or .idx: all of it")
    source.add_argument(
        "--text", nargs="+", metavar="PATH", help=".jsonl (plain, .gz, .zst) or .txt files, folders, globs"
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="of --text's JSON lines")
    parser.add_argument("--stride", type=positive, metavar="N", help="slide the window N tokens at a time")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="windows at once")
    parser.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="predict the first N tokens only; of a blend, whole samples in its proportions",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def evaluate(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """What is printed of one run, by name.

    Raises:
        UserError: a run, dataset or text that cannot be used.
    """
    run = load_run(folder, arguments.step, arguments.tokenizer)
    streams = streams_of(run, arguments)
    measured = [
        measure(
            run.decoder,
            ids,
            run.tokenizer,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            # What a blend reads was cut to whole samples of each dataset already.
            max_tokens=arguments.max_tokens if len(streams) == 1 else None,
            progress=True,
        )
        for ids in streams
    ]
    described = {
        "run": str(run.folder),
        "step": run.step,
        "split": arguments.split,
        "stride": arguments.stride,
    }
    return {**described, **numbers_of(sum_of(measured))}


def streams_of(run: TrainedRun, arguments: argparse.Namespace) -> Sequence[TokenStream]:
    """The token ids to predict; warnings about them go to stderr."""
    if arguments.split is not None:
        return split_streams(run, arguments.split, arguments.max_tokens)
    if arguments.text is not None:
        enough = None if arguments.max_tokens is None else arguments.max_tokens + 1
        return [ids_of_texts(arguments.text, required_tokenizer(run), arguments.json_key, enough)]
    dataset = IndexedDataset(arguments.data)
    for warning in (*check_tokenizer(run, arguments.data), *training_warnings(run, arguments.data)):
        logger.warning(warning)
    return [DatasetTokens(dataset)]


def numbers_of(result: TextLoss) -> dict[str, object]:
    """The measurements; None where the text is not known."""
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "word_perplexity": result.word_perplexity,
        "bits_per_byte": result.bits_per_byte,
        "nll_nats": result.nll_nats,
        "tokens": result.tokens,
        "words": result.words,
        "text_bytes": result.text_bytes,
    }


def describe(numbers: dict[str, object]) -> str:
    """The same for people."""
    protocol = (
        "the training loop's windows" if numbers["stride"] is None else f"sliding, stride {numbers['stride']}"
    )
    split = f"the {numbers['split']} split, " if numbers["split"] else ""
    lines = [
        f"{numbers['run']}, step {numbers['step']:,}: {split}{numbers['tokens']:,} tokens, {protocol}",
        f"loss                {numbers['loss']:.4f} nats per token",
        f"perplexity          {numbers['perplexity']:.2f} per token",
    ]
    words, text_bytes = numbers["words"], numbers["text_bytes"]
    if text_bytes is None:
        lines.append("per word and byte   not measured: the run records no tokenizer; give --tokenizer")
    if words:
        lines.append(f"perplexity          {numbers['word_perplexity']:.2f} per word ({words:,} words)")
    if text_bytes:
        lines.append(f"bits per byte       {numbers['bits_per_byte']:.4f} ({text_bytes:,} bytes of UTF-8)")
    return "\n".join(lines)


@command()
def main(argv: Sequence[str]) -> int:
    """Measure and print; 0."""
    arguments = parse_arguments(argv)
    folders, found, failed = [], [], None
    try:
        folders = run_folders(arguments.run)
        for number, folder in enumerate(folders):
            found.append(evaluate(folder, arguments))
            if not arguments.json:
                print(("\n" if number else "") + describe(found[-1]), flush=True)
    except UserError as error:
        failed = error
    if arguments.json and found:  # also where a later run cannot be measured
        print(json.dumps(finite(found if len(folders) > 1 else found[0]), indent=2), flush=True)
    if failed is not None:
        raise failed
    return 0
