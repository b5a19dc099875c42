"""Which ranks have other values than most, in words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_lpa import errors

_MOST_NAMED = 8
_ABSENT = "not there"


def named(ranks: Sequence[int]) -> str:
    """Numbers of ranks in a line, the first few of many."""
    return ", ".join(map(str, ranks[:_MOST_NAMED])) + (", ..." if len(ranks) > _MOST_NAMED else "")


def disagreement(facts: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str:
    """What differs between processes that have to be alike; empty when nothing does.

    Args:
        facts: of each rank, by name.
        hosts: of each rank.

    Returns:
        One line that names ranks, hosts and values. Those in the minority are said to differ; of two equally
        large groups, those without rank 0.
    """
    parts = []
    names = sorted({name for found in facts for name in found})
    for name in names:
        texts = [_member(found, name) for found in facts]
        if len(set(texts)) > 1:
            parts.append(_described(name, texts, hosts))
    if not parts:
        return ""
    more = f"; and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
    return (
        f"the processes of this run were not started alike: {'; '.join(parts[:_MOST_NAMED])}{more}. Start "
        "all with one command, from one installation and the same files"
    )


def _described(name: str, texts: Sequence[str], hosts: Sequence[str]) -> str:
    counts = Counter(texts)
    usual = max(counts, key=lambda text: (counts[text], text == texts[0]))
    first = texts.index(usual)
    beside = f"on rank {first} ({hosts[first]})"
    others = [text for text in counts if text != usual]
    where = {}
    for text in others:
        ranks = [rank for rank, own in enumerate(texts) if own == text]
        on = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks[:_MOST_NAMED]))
        where[text] = f"on rank {named(ranks)} ({on})"
    if all(len(text) <= errors.MOST_COMPARED for text in counts):
        groups = [f"{text or _ABSENT} {where[text]}" for text in others]
        return f"{name} is {', '.join(groups)}, but {usual or _ABSENT} {beside}"
    parts = []
    for text in others[:_MOST_NAMED]:
        place, own, theirs = _first_difference(name, text, usual)
        parts.append(f"{place} is {own} {where[text]}, but {theirs} {beside}")
    more = len(others) - len(parts)
    return "; ".join(parts) + (f"; and {more} more values of {name}" if more else "")


def _first_difference(name: str, own: str, theirs: str) -> tuple[str, str, str]:
    """The name of the innermost member where two texts of JSON differ first, and what each has there, cut to
    fit."""
    while own and theirs and max(len(own), len(theirs)) > errors.MOST_COMPARED:
        ours, others = json.loads(own), json.loads(theirs)
        if isinstance(ours, dict) and isinstance(others, dict):
            key = next(key for key in sorted({*ours, *others}) if _member(ours, key) != _member(others, key))
            name, own, theirs = f"{name}.{errors.named(key)}", _member(ours, key), _member(others, key)
        elif isinstance(ours, list) and isinstance(others, list):
            index = next(
                (
                    n
                    for n, pair in enumerate(zip(ours, others, strict=False))
                    if _text(pair[0]) != _text(pair[1])
                ),
                min(len(ours), len(others)),
            )
            name = f"{name}[{index}]"
            own, theirs = (_text(of[index]) if index < len(of) else "" for of in (ours, others))
        else:
            break
    own, theirs = errors.differing_parts(own, theirs)
    return name, own or _ABSENT, theirs or _ABSENT


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _member(of: Mapping[str, Any], key: str) -> str:
    return _text(of[key]) if key in of else ""


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """``{"train": {"seed": 1}}`` as ``("train.seed", 1)``; anything but a mapping is a value."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree
