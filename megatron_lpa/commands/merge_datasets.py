"""Merges token datasets into one, in the order given: ``<output-prefix>.{bin,idx,json}``.

    python tools/merge_datasets.py --input data/a_text_document data/b_text_document --output-prefix data/ab
    python tools/merge_datasets.py --input 'shards/pile.*_text_document.idx' --expect 30 \\
        --output-prefix data/pile

Exit code 3 means that the merge is complete, but bad records were left out when the inputs were made.
The .bin and .idx are byte for byte what preprocessing everything at once would have written. A pattern in
quotes is sorted naturally (2 before 10); one that the shell expands is not.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from megatron_lpa.command_line import command, end_politely, tool_parser
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.errors import EXIT_INCOMPLETE
from megatron_lpa.preparation.merge import merge

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="datasets or glob patterns, with or without .idx, .bin or .json at the end",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PATH", help="without an ending")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare the inputs with the checksums in their manifests",
    )
    parser.add_argument(
        "--expect", type=int, metavar="N", help="refuse another number of inputs, as when a shard is missing"
    )
    parser.add_argument(
        "--allow-missing-manifests",
        action="store_true",
        help="merge although only some inputs have a manifest; the output then has none",
    )
    parser.add_argument(
        "--allow-same-sources",
        action="store_true",
        help="merge although two inputs were made from one file, as for two of its subsets",
    )
    return parser.parse_args(argv)


@command("interrupted; only a finished merge has an .idx")
def main(argv: Sequence[str]) -> int:
    """Merge; 0, or 3 if the inputs lack bad records."""
    arguments = parse_arguments(argv)
    # A polite kill unwinds the stack, which removes unfinished files.
    end_politely()
    manifest = merge(
        arguments.input,
        arguments.output_prefix,
        overwrite=arguments.overwrite,
        verify=not arguments.no_verify,
        expect=arguments.expect,
        allow_missing_manifests=arguments.allow_missing_manifests,
        allow_same_sources=arguments.allow_same_sources,
    )
    merged = IndexedDataset(arguments.output_prefix, check=False)
    print(
        f"{arguments.output_prefix}: {merged.num_documents} documents, {merged.num_tokens} tokens "
        f"({merged.dtype.name})" + ("" if manifest else "; no manifest, as not all inputs have one")
    )
    if manifest is not None and manifest.rejected_documents:
        logger.warning(f"{manifest.rejected_documents} bad records were left out of the inputs")
        return EXIT_INCOMPLETE
    return 0
