"""Which ranks have other values than most, in words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MOST_NAMED = 8
_LONGEST_VALUE = 120


def named(ranks: Sequence[int]) -> str:
    """Numbers of ranks in a line, the first few of many."""
    return ", ".join(map(str, ranks[:_MOST_NAMED])) + (", ..." if len(ranks) > _MOST_NAMED else "")


def disagreement(facts: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str:
    """What differs between processes that have to be alike; empty when nothing does.

    Args:
        facts: of each rank, by name.
        hosts: of each rank.

    Returns:
        One line that names ranks, hosts and values. Those in the minority are said to differ; of two equally large
        groups, those without rank 0.
    """
    parts = []
    names = sorted({name for found in facts for name in found})
    for name in names:
        texts = [json.dumps(found[name], sort_keys=True) if name in found else "" for found in facts]
        if len(set(texts)) > 1:
            parts.append(_described(name, texts, hosts))
    if not parts:
        return ""
    more = f"; and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
    return (
        f"the processes of this run were not started alike: {'; '.join(parts[:_MOST_NAMED])}{more}. Start all with one "
        "command, from one installation and the same files"
    )


def _described(name: str, texts: Sequence[str], hosts: Sequence[str]) -> str:
    counts = Counter(texts)
    usual = max(counts, key=lambda text: (counts[text], text == texts[0]))
    groups = []
    for text in dict.fromkeys(texts):
        if text != usual:
            ranks = [rank for rank, own in enumerate(texts) if own == text]
            where = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks[:_MOST_NAMED]))
            groups.append(f"{_short(text)} on rank {named(ranks)} ({where})")
    first = texts.index(usual)
    return f"{name} is {', '.join(groups)}, but {_short(usual)} on rank {first} ({hosts[first]})"


def _short(text: str) -> str:
    if not text:
        return "not there"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """``{"train": {"seed": 1}}`` as ``("train.seed", 1)``; anything but a mapping is a value."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree
