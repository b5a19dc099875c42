"""Training of a byte-level BPE tokenizer on the user's own text."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_lpa.data.storage.partial_file import explained_write_errors
from megatron_lpa.errors import UserError
from megatron_lpa.files import exists, from_disk, is_dir, write_whole
from megatron_lpa.preparation.documents import read_texts

EOD_TOKEN = "<|endoftext|>"
MAX_VOCAB_SIZE = 2**24
MIN_VOCAB_SIZE = 257  # the end-of-document token and the 256 bytes


def train_tokenizer(inputs: Sequence[str], vocab_size: int, output: str, json_key: str = "text") -> int:
    """Trains on the text of ``inputs`` and writes a folder that ``load_tokenizer`` and transformers read.

    ``<|endoftext|>`` is id 0 and every byte has a token, so any text can be encoded. The same text gives the
    same files. The folder appears whole or not at all.

    Args:
        inputs: files, folders and glob patterns; see ``sources.py``.
        vocab_size: tokens wanted, 257 or more.
        output: folder to create.
        json_key: key of the JSON lines to train on.

    Returns:
        tokens in the vocabulary: fewer than ``vocab_size`` where the text has no more pairs to merge.

    Raises:
        UserError: bad input, a vocabulary below 257, or an output folder that holds something.
    """
    if vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"--vocab-size is {vocab_size}; give {MAX_VOCAB_SIZE} or less, larger ones are of no use and do "
            "not fit into memory"
        )
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocab-size is {vocab_size}; give {MIN_VOCAB_SIZE} or more, for all bytes and {EOD_TOKEN}"
        )
    folder = Path(output)
    if exists(folder) and not (is_dir(folder) and not from_disk(lambda: os.listdir(folder), folder)):
        raise UserError(f"{folder}: exists and is not an empty folder; choose another --output")

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = filter(None, read_texts(inputs, json_key))
    first = next(texts, None)
    if first is None:
        raise UserError(f"{' '.join(inputs)}: no text in there to train a tokenizer on")
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    with explained_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            scratch.chmod(0o777 & ~_umask())
            write_whole(scratch / "tokenizer.json", tokenizer.to_str(pretty=True))
            write_whole(scratch / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
            os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
