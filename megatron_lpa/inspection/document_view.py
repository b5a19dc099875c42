"""One document of a token dataset, as ids and as text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_lpa.data.storage.dataset_manifest import Manifest, manifest_path, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.tokenizers.opening import Tokenizer, load_tokenizer, local_path
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import exists


@dataclass(frozen=True)
class DocumentView:
    """One document.

    Args:
        number: counted from 0.
        first_token: its position in the ``.bin``, in tokens.
        ids: its token ids.
        text: decoded; ``None`` without a tokenizer.
        note: why there is no text, or what could not be checked; may be empty.
    """

    number: int
    first_token: int
    ids: list[int]
    text: str | None
    note: str


def view_document(prefix: str, number: int, tokenizer: str | None = None) -> DocumentView:
    """Looks at one document.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        number: counted from 0, or from the end when negative: -1 is the last.
        tokenizer: what :func:`load_tokenizer` takes. Without it, the one the manifest names is used if it is
            on this machine and its fingerprint is the recorded one.

    Raises:
        UserError: there is no such document, the dataset is damaged, or ``tokenizer`` is not the one that
            made the ids.
    """
    dataset, manifest = IndexedDataset(prefix), read_manifest(prefix)
    count = dataset.num_documents
    if not -count <= number < count:
        raise UserError(
            f"{prefix}: has no document {number}; give 0 to {count - 1}, or -1 to {-count} from the end"
        )
    number %= count
    ids, first_token = dataset.document(number), dataset.document_offset(number)
    loaded, note = _given(prefix, manifest, tokenizer) if tokenizer else _recorded(manifest)
    text = None
    if loaded is not None:
        _check_ids(prefix, ids, first_token, loaded)
        text = loaded.decode(ids.tolist())
    return DocumentView(number, first_token, ids.tolist(), text, note)


def _given(prefix: str, manifest: Manifest | None, name: str) -> tuple[Tokenizer, str]:
    tokenizer = load_tokenizer(name)
    if manifest is None:
        return tokenizer, "no manifest, so it is not known whether this tokenizer made the ids"
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        raise UserError(
            f"{name}: has the fingerprint {tokenizer.fingerprint}, but {manifest_path(prefix)} was made with "
            f"{manifest.tokenizer.fingerprint} ({manifest.tokenizer.name}); give that --tokenizer"
        )
    return tokenizer, ""


def _recorded(manifest: Manifest | None) -> tuple[Tokenizer | None, str]:
    if manifest is None:
        return None, "no manifest, which would name the tokenizer; give --tokenizer to see the text"
    name = manifest.tokenizer.name
    try:
        if not exists(local_path(name)):
            return None, f"the tokenizer {name} is not here; give --tokenizer to see the text"
        tokenizer = load_tokenizer(name)
    except TryAgain:
        raise
    except UserError as error:
        return None, f"the tokenizer cannot be read ({error}); give --tokenizer to see the text"
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        return None, (
            f"the tokenizer {name} is another one by now (fingerprint {tokenizer.fingerprint}, recorded "
            f"{manifest.tokenizer.fingerprint}); give the old one as --tokenizer to see the text"
        )
    return tokenizer, ""


def _check_ids(prefix: str, ids: np.ndarray, first_token: int, tokenizer: Tokenizer) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
    if wrong.size:
        raise UserError(
            f"{prefix}.bin: token {first_token + int(wrong[0])} is {ids[wrong[0]]}, which {tokenizer.name} "
            f"({tokenizer.vocab_size} ids) does not know; give the --tokenizer that made the ids, or look "
            "for damage with --verify"
        )
