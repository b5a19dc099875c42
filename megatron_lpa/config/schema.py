"""What can be configured: every dotted key with its type, default and one-line documentation.

The dataclasses are the only source; this module reads them, so a new field needs no entry here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_lpa.config.run import RunConfig


class ByLayer(dict[str, int | str]):
    """Stands for the type of ``by_layer``."""


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: 'names and numbers as {"data/a": 0.7, "data/b": 0.3}',
    ByLayer: "layers, each with dense or a rank, as {0: dense, 1-3: 64}",
}
_TABLES = {dict[str, float]: dict, dict[str, int | str]: ByLayer}


@dataclass(frozen=True)
class ConfigKey:
    """One leaf of ``RunConfig``.

    Args:
        name: dotted key, as ``model.hidden_size``.
        base_type: ``int``, ``float``, ``bool`` or ``str``, which is also that of a choice; ``dict`` for
            numbers by name, ``ByLayer`` for what differs by layer.
        choices: the allowed values of a choice, else empty.
        optional: whether the value may be empty (``null``).
        default: the dataclass's default.
        doc: what the key means, on one line.
    """

    name: str
    base_type: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    doc: str

    @property
    def expected(self) -> str:
        """What a value must look like, in words for an error message."""
        words = f"one of {', '.join(self.choices)}" if self.choices else _TYPE_NAMES[self.base_type]
        return f"{words}, or null" if self.optional else words


def _argument_docs(cls: type) -> dict[str, str]:
    """One line per entry of the ``Args:`` part of a docstring."""
    arguments = (cls.__doc__ or "").partition("Args:\n")[2]
    docs: dict[str, str] = {}
    name = ""
    for line in arguments.splitlines():
        entry = re.match(r" {8}(\w+): (.*)", line)
        if entry:
            name, docs[entry[1]] = entry[1], entry[2].strip()
        elif name and line.strip():
            docs[name] += " " + line.strip()
    return docs


def _leaves(cls: type, prefix: str) -> Iterator[ConfigKey]:
    hints, docs = get_type_hints(cls), _argument_docs(cls)
    for field in dataclasses.fields(cls):
        annotation = hints[field.name]
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from _leaves(annotation, f"{prefix}{field.name}.")
            continue
        optional = get_origin(annotation) in (Union, types.UnionType)
        if optional:
            (annotation,) = (a for a in get_args(annotation) if a is not type(None))
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        base_type = str if choices else _TABLES.get(annotation, annotation)
        assert base_type in _TYPE_NAMES, f"{cls.__name__}.{field.name}: {annotation} cannot be configured"
        yield ConfigKey(
            prefix + field.name, base_type, choices, optional, field.default, docs.get(field.name, "")
        )


CONFIG_KEYS: dict[str, ConfigKey] = {key.name: key for key in _leaves(RunConfig, "")}
"""Every configurable key, in the order of the dataclasses."""

CONFIG_SECTIONS: frozenset[str] = frozenset(
    name.rsplit(".", depth)[0] for name in CONFIG_KEYS for depth in range(1, name.count(".") + 1)
)
"""Every inner node: ``model``, ``model.projections``, ``model.projections.q``, ..."""


LONGEST_NAME = 100
"""Comparing takes time with the square of the length."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The ``known`` names that a reader of ``name`` most likely meant, best first; may be empty.

    A dotted name also matches by its last part, so ``lr`` and ``model.lr`` both find ``optim.lr``. Names that
    differ in another part only come together, however many: ``rank`` is the rank of any projection. A name
    that is much longer than any known one has no neighbour.
    """
    if len(name) > LONGEST_NAME:
        return []
    names = list(known)
    if ends := [each for each in names if re.search(rf"[./]{re.escape(name)}\Z", each)]:
        return ends
    by_last: dict[str, list[str]] = {}
    for each in names:
        by_last.setdefault(_last_part(each), []).append(each)
    last = _last_part(name)
    same_last = by_last.get(last, [])
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.75)
    groups = [by_last[part] for part in difflib.get_close_matches(last, by_last, n=count, cutoff=0.7)]
    close = list(dict.fromkeys([*(each for each in names if each.lower() == name.lower()), *close]))
    # The whole name is the better evidence unless only its last part is right.
    ranked = dict.fromkeys([*close[:1], *same_last, *close[1:], *(n for group in groups for n in group)])
    together = {*close[:1], *same_last} if same_last else {} if close or not groups else groups[0]
    return list(ranked)[: max(count, len(together))]


def _last_part(name: str) -> str:
    return re.split(r"[./]", name)[-1]
