"""Says what a token dataset holds, shows single documents, and finds damage.

    python tools/inspect_dataset.py data/corpus_text_document
    python tools/inspect_dataset.py data/corpus_text_document --document -1 --tokenizer data/tokenizer
    python tools/inspect_dataset.py data/corpus_text_document --verify

The exit code is 78 when --verify finds anything wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lpa.command_line import command, tool_parser
from megatron_lpa.errors import EXIT_REFUSED, TryAgain, UserError
from megatron_lpa.evaluate.curves import save_png
from megatron_lpa.files import LASTING
from megatron_lpa.inspection.document_view import DocumentView, view_document
from megatron_lpa.inspection.rendering import length_figure, summary_json, summary_text
from megatron_lpa.inspection.statistics import summarize
from megatron_lpa.inspection.verification import Verification, verify

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="path without .bin and .idx")
    parser.add_argument(
        "--document", type=int, metavar="N", help="show the ids and text of one; -1 is the last"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="for --document (default: the one the manifest names)"
    )
    parser.add_argument("--histogram", metavar="FILE.png", help="draw the lengths of the documents")
    parser.add_argument("--verify", action="store_true", help="read everything and check what can be checked")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser.parse_args(argv)


def document_text(view: DocumentView) -> str:
    """Several lines for a person."""
    lines = [f"document {view.number}: {len(view.ids):,} tokens from token {view.first_token:,} on"]
    lines += textwrap.wrap(" ".join(map(str, view.ids)), 100)
    if view.text is not None:
        lines += ["", _printable(view.text)]
    return "\n".join(lines)


def _printable(text: str) -> str:
    # A corpus from the web may hold commands to the terminal.
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def verification_text(found: Verification) -> str:
    """Several lines for a person."""
    lines = [str(problem) for problem in found.problems]
    lines += [f"{count} more problems of the kind {kind}" for kind, count in found.unlisted.items()]
    lines += [f"not checked: {what}" for what in found.unchecked]
    number = len(found.problems) + sum(found.unlisted.values())
    return "\n".join(
        [*lines, f"verified: {number} problem{'s' * (number > 1)}" if number else "verified: no problems"]
    )


def inspect(arguments: argparse.Namespace) -> int:
    """Print what is asked for; the exit code.

    Raises:
        UserError: what the user can mend.
    """
    if arguments.tokenizer is not None and arguments.document is None:
        raise UserError("--tokenizer is for --document; give both or neither")
    if arguments.histogram is not None and not arguments.histogram.endswith(".png"):
        raise UserError(f"--histogram {arguments.histogram}: only PNG is written; give a name ending in .png")
    content: dict[str, Any] = {}
    blocks: list[str] = []
    found = verify(arguments.prefix) if arguments.verify else None
    broken = found is not None and bool(found.problems)
    try:
        _describe(arguments, content, blocks)
    except UserError as error:
        if not broken:
            raise
        logger.error(error)  # what was found is printed all the same
    if found is not None:
        content["verification"] = asdict(found)
        blocks.append(verification_text(found))
    print(json.dumps(content, indent=2, ensure_ascii=True) if arguments.json else "\n\n".join(blocks))
    return EXIT_REFUSED if broken else 0


def _describe(arguments: argparse.Namespace, content: dict[str, Any], blocks: list[str]) -> None:
    """Adds what the dataset holds to ``content``, for programs, and ``blocks``, for a person."""
    summary = summarize(arguments.prefix)
    content |= summary_json(summary)
    blocks.append(summary_text(summary))
    if arguments.histogram is not None:
        save_png(length_figure(summary), Path(arguments.histogram))
    if arguments.document is not None:
        view = view_document(arguments.prefix, arguments.document, arguments.tokenizer)
        content["document"] = asdict(view)
        blocks.append(document_text(view))
        if view.note:
            logger.info(f"note: {view.note}")


@command()
def main(argv: Sequence[str]) -> int:
    """Inspect; 0, or 78 for what --verify found."""
    arguments = parse_arguments(argv)
    try:
        return inspect(arguments)
    except OSError as error:
        if error.filename is None:  # of what reads this tool
            raise
        kind = UserError if error.errno in LASTING else TryAgain
        raise kind(f"{arguments.prefix}: cannot be read ({error.strerror or error})") from error
