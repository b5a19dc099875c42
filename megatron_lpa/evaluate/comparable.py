"""Whether losses of several runs may be compared: what they are of, besides the models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lpa.checkpoint.manifest import complete_checkpoints, described
from megatron_lpa.data.identity import identity_of
from megatron_lpa.data.storage.dataset_manifest import read_manifest
from megatron_lpa.errors import TryAgain, UserError, named
from megatron_lpa.evaluate.held_out import data_of, fingerprint_of, split_streams
from megatron_lpa.evaluate.perplexity import count_text
from megatron_lpa.evaluate.trained import RecordedRun, read_config, recorded_run, required_tokenizer
from megatron_lpa.run_folder import CHECKPOINTS

UNKNOWN = "unknown"
HELD_OUT = {"valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Source:
    """What held-out text is cut from and how, in a form to compare; None where that is not known.

    Args:
        cut: how documents are shared out.
        recorded: what the run's checkpoint says of the data: of its token ids.
        text: of the text, or of its ids where the text is not known. The data has to be there for it.
    """

    cut: Any
    recorded: Any
    text: Any


@dataclass(frozen=True)
class Terms:
    """What the losses of a run are of; None where the run folder does not tell.

    Args:
        tokenizer: fingerprint of the one that made the data, in hex.
        data: of each kind of held-out loss.
        tokens: evaluated, of each kind of held-out loss.
        sequence_length: tokens of a window.
        whole_blocks: ``train.predict_next_block``: whether each token of a window is predicted.
    """

    tokenizer: str | None
    data: dict[str, Source]
    tokens: dict[str, int | None]
    sequence_length: int
    whole_blocks: bool = True


def terms_of(folder: Path, tokens: dict[str, int | None]) -> Terms:
    """The terms of a run.

    Args:
        folder: the run's.
        tokens: evaluated, by kind, as its records say.

    Raises:
        UserError: no run folder.
        TryAgain: the disk does not give a file.
    """
    config = read_config(folder)
    run = RecordedRun(config, None, folder, _manifest(folder))
    known = _or_none(lambda: fingerprint_of(run))
    return Terms(
        known[0] if known else None,
        {kind: _source(run, kind) for kind in HELD_OUT},
        tokens,
        config.model.sequence_length,
        config.train.predict_next_block,
    )


def _manifest(folder: Path) -> dict[str, Any]:
    complete = complete_checkpoints(folder / CHECKPOINTS)
    return (_or_none(lambda: described(complete[-1], complete=False)) if complete else None) or {}


def _or_none(read: Callable[[], Any]) -> Any:
    """What is read; None where it is not there any more, or damaged."""
    try:
        return read()
    except TryAgain:
        raise
    except (UserError, OSError):
        return None


def _source(run: RecordedRun, kind: str) -> Source:
    data = data_of(run)
    if data.train_prefix is not None:
        prefix = data.valid_prefix if kind == "valid" else data.test_prefix
        return Source("all", None, _text(prefix) if prefix else None)
    cut = [data.split, data.shuffle_documents and run.config.train.seed]
    texts = [(weight, _text(prefix)) for prefix, weight in sorted((data.blend or {}).items())]
    if data.prefix is not None:
        texts = [(1.0, _text(data.prefix))]
    recorded = run.manifest.get("order", {}).get("data") or None
    return Source(
        cut, _without(recorded, "sequence_length"), None if (None in dict(texts).values()) else texts
    )


def _without(value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without(item, key) for name, item in value.items() if name != key}


def _text(prefix: str) -> Any:
    """Hashes of the source files where they are known, so that the tokenizer has no part in it."""
    manifest = _or_none(lambda: read_manifest(prefix))
    if manifest is not None and manifest.sources and all(source.sha256 for source in manifest.sources):
        hashes = [source.sha256 for source in manifest.sources]
        return [manifest.documents, manifest.json_key, manifest.append_eod, *hashes]
    identity = _or_none(lambda: identity_of(prefix))
    return None if identity is None else identity.contents


def same_data(one: Terms, other: Terms, kind: str) -> bool | None:
    """Whether losses of a kind are of the same text; None where that is not known."""
    if kind not in one.data:
        return None
    a, b = one.data[kind], other.data[kind]
    if a.cut != b.cut:
        return False
    if a.recorded is not None and a.recorded == b.recorded:
        return True
    if a.text is not None and b.text is not None:
        return bool(a.text == b.text)
    if a.recorded is not None and b.recorded is not None and same_tokenizer((one, other)):
        return False
    return None


def same_tokenizer(terms: Sequence[Terms]) -> bool:
    """Whether no two runs are known to have different ones."""
    return len({each.tokenizer for each in terms if each.tokenizer}) < 2


def warn_of_tokenizers(labels: Sequence[str], folders: Sequence[Path]) -> str | None:
    """A warning where losses per token of run folders are of different tokenizers, as far as the folders
    tell."""
    terms = [_or_none(partial(terms_of, folder, {})) for folder in folders]
    known = [(label, each) for label, each in zip(labels, terms, strict=True) if each is not None]
    found = notes([label for label, _ in known], [each for _, each in known], explained=False)
    return found[0] if found and not same_tokenizer([each for _, each in known]) else None


def notes(labels: Sequence[str], terms: Sequence[Terms], explained: bool) -> list[str]:
    """Sentences about what keeps losses from being compared; none where nothing does.

    Args:
        labels: of the runs.
        terms: of the runs.
        explained: whether bits per byte are beside the losses.
    """
    found: list[str] = []
    if not same_tokenizer(terms):
        found.append(
            "Different tokenizers "
            f"({_each(labels, [each.tokenizer and each.tokenizer[:16] for each in terms])}): a token is "
            "another amount of text, so losses and perplexities per token are not comparable. "
            + ("Bits per byte are." if explained else WAY_OUT)
        )
    elif len(terms) > 1 and any(each.tokenizer for each in terms) and not all(e.tokenizer for e in terms):
        unknown = [label for label, each in zip(labels, terms, strict=True) if each.tokenizer is None]
        found.append(
            f"Which tokenizer made the data of {' and '.join(unknown)} is not known; losses and perplexities "
            "per token are comparable if it is the same one."
        )
    for kind, name in HELD_OUT.items():
        have = [(label, each) for label, each in zip(labels, terms, strict=True) if each.tokens.get(kind)]
        if len(have) < 2:
            continue
        names, each = [label for label, _ in have], [terms_ for _, terms_ in have]
        same = [same_data(each[0], terms_, kind) for terms_ in each[1:]]
        if False in same:
            found.append(f"The {name} data is not the same, so {name} losses are not comparable.")
        elif None in same:
            found.append(
                f"Whether the {name} data is the same is not known: it is not where the runs had it."
            )
        elif same_tokenizer(terms) and len({terms_.tokens[kind] for terms_ in each}) > 1:
            counts = _each(names, [f"{terms_.tokens[kind]:,}" for terms_ in each])
            found.append(f"The {name} losses are of different amounts of tokens: {counts}.")
    if len({each.sequence_length for each in terms}) > 1:
        lengths = _each(labels, [f"{each.sequence_length:,}" for each in terms])
        found.append(
            f"Different sequence lengths ({lengths}): a token is predicted from another amount of context."
        )
    if len({each.whole_blocks for each in terms}) > 1:
        said = _each(labels, [str(each.whole_blocks).lower() for each in terms])
        found.append(
            f"Different labels (train.predict_next_block: {said}): some leave the last token of each window "
            "out, so their losses are of fewer tokens."
        )
    return found


WAY_OUT = (
    "For bits per byte, which are, evaluate each run on the same text: tools/evaluate.py --run FOLDER "
    "--text FILE."
)


def comparable(terms: Sequence[Terms], kind: str) -> bool:
    """Whether losses per token of a kind may be of the same tokens; kinds are those of records."""
    return same_tokenizer(terms) and all(same_data(terms[0], each, kind) is not False for each in terms)


def _each(labels: Sequence[str], values: Sequence[str | None]) -> str:
    return ", ".join(
        f"{named(label)} {value or UNKNOWN}" for label, value in zip(labels, values, strict=True)
    )


def text_bytes(folder: Path, kind: str, tokens: int) -> int | None:
    """UTF-8 bytes of the tokens that a validation or test of a run has predicted.

    Args:
        folder: the run's.
        kind: valid or test.
        tokens: predicted, as the record says.

    Returns:
        None where the data or the tokenizer is not there any more, the data is not what was evaluated, or the
        run does not predict each token of a window (``train.predict_next_block=false``): then they are not
        next to each other.
    """

    def count() -> int | None:
        run = recorded_run(folder)
        if not run.config.train.predict_next_block:
            return None
        streams = split_streams(run, kind, tokens)
        if sum(len(ids) - 1 for ids in streams) != tokens:
            return None
        tokenizer = required_tokenizer(run)
        return sum(count_text(ids[1:], tokenizer)[1] for ids in streams)

    found: int | None = _or_none(count)
    return found


def bits_per_byte(loss: float, tokens: int, number_of_bytes: int) -> float:
    """Of a mean loss per token in nats."""
    return loss * tokens / number_of_bytes / math.log(2)
