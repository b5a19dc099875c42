"""What was probably meant by the prefix of a dataset that is not there."""

from __future__ import annotations

import difflib
import os

from megatron_lpa.errors import UserError
from megatron_lpa.files import names_in
from megatron_lpa.run_folder import shown

_TEXT = (".jsonl", ".json", ".gz", ".zst", ".txt", ".parquet")
_MOST_NAMED = 3
_CLOSE = 0.85
"""Names of datasets mostly end alike."""


def meant_instead(prefix: str) -> str:
    """Advice for a message: datasets near by, or what makes one."""
    write = "give the prefix of a dataset that tools/preprocess_data.py wrote"
    if prefix.endswith(_TEXT) and os.path.exists(prefix):
        return (
            f"{shown(prefix)} is text: make a dataset of it with tools/preprocess_data.py, and give its "
            "prefix"
        )
    folder, name = (prefix.rstrip("/"), "") if os.path.isdir(prefix) else os.path.split(prefix)
    try:
        there = [found[:-4] for found in names_in(folder or ".") if found.endswith(".idx")]
    except UserError:  # it may not be read
        return write
    # tools/preprocess_data.py adds the key of the text to the prefix that it is given.
    longer = [found for found in there if found.startswith(f"{name}_") and found.endswith("_document")]
    close = difflib.get_close_matches(name[:100], there, n=_MOST_NAMED, cutoff=_CLOSE)
    guesses = (there if not name else longer or close)[:_MOST_NAMED]
    if not guesses:
        return write
    return f"did you mean {' or '.join(shown(os.path.join(folder, guess)) for guess in guesses)}?"
