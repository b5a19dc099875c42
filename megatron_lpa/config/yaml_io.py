"""YAML as people write configurations: YAML 1.2's numbers and booleans, no silently repeated keys.

PyYAML follows YAML 1.1, where ``8e-4`` is text, ``off`` is false and ``1:30`` is ninety. What is read may
come from a stranger: no tag makes an object, and neither depth nor aliases make more of a file than it has
lines.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_lpa.errors import UserError, named, shown
from megatron_lpa.files import read_text

MOST_BYTES = 1 << 20
MOST_NODES = 20_000
"""Values of a file, every alias counted as what it stands for."""

MOST_DEPTH = 20
MOST_DIGITS = 100

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
)
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe loading with the scalars above. What a configuration has no use for is refused while it is
    read."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (replaces PyYAML's table)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self._nodes += 1
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise _refused(f"nested deeper than the {MOST_DEPTH} levels that are read", event)
        if self._nodes > MOST_NODES:
            raise _refused(_TOO_MANY, event)
        if (tag := getattr(event, "tag", None)) is not None:
            raise _refused(f"the tag {named(tag)} is not known here; leave it out, and quote text", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a list or a mapping is no key; a key is a name", key_node)
            if key_node.value in seen and key_node.tag != _MERGE:
                raise _refused(f"the key {shown(key_node.value)} appears twice", key_node)
            seen.add(key_node.value)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, set())
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            raise _refused(f"a number of {len(node.value):,} digits", node)
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_TOO_MANY = f"more than {MOST_NODES:,} values, each alias counted as what it stands for"


def _refused(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _count(node: yaml.Node, counted: dict[int, int], above: set[int]) -> int:
    """Values that a node stands for, with its aliases followed; raises where they are too many.

    Args:
        node: what is counted; its depth is known to be small.
        counted: what is known of other nodes already, so that each is looked at once.
        above: nodes that this one lies in.
    """
    if id(node) in above:
        raise _refused("an alias of what it lies in itself", node)
    if (known := counted.get(id(node))) is not None:
        return known
    total = 1
    if isinstance(node, yaml.CollectionNode):
        above.add(id(node))
        for item in node.value:
            for part in item if isinstance(node, yaml.MappingNode) else (item,):
                total += _count(part, counted, above)
        above.remove(id(node))
    if total > MOST_NODES:
        raise _refused(_TOO_MANY, node)
    counted[id(node)] = total
    return total


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML version, or this loader, would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}",
            re.compile(rf"^(?:{_pattern})$"),
            ["" if c == "\0" else c for c in _first],
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty mapping.

    Raises:
        UserError: the file is missing, not a regular file, or longer than ``MOST_BYTES``; or as
            ``parse_yaml``.
        TryAgain: the disk does not give it.
    """
    try:
        text = read_text(path, MOST_BYTES)
    except OSError as error:
        raise UserError(
            f"cannot read the configuration {named(path)}: {error.strerror}; check the path"
        ) from error
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as 'model:' and 'train:', not {type(tree).__name__}")
    return tree


def parse_yaml(text: str, source: str) -> Any:
    """What YAML text says: None, bool, int, float, str, and lists and dicts of these.

    Args:
        text: one document.
        source: what the text is, for messages.

    Raises:
        UserError: it is not YAML, repeats a key, or has what no configuration needs: tags, several documents,
            depth, aliases that multiply it, numbers of many digits.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = (error.problem or error.context or "").splitlines()[:1] or [""]
        if problem == ["but found another document"]:
            problem = ["it holds several documents; leave one, without lines of '---'"]
        raise UserError(f"{source}{line}: not valid YAML: {problem[0][:200]}") from error
    except yaml.reader.ReaderError as error:
        line = f", line {text.count(chr(10), 0, error.position) + 1}"
        raise UserError(
            f"{source}{line}: not valid YAML: the character "
            f"{shown(text[error.position : error.position + 1])} has no place in text"
        ) from error
    except (ValueError, OverflowError) as error:  # "\\UFFFFFFFF"
        line = f", line {loader.get_mark().line + 1}" if loader is not None else ""
        raise UserError(f"{source}{line}: not valid YAML: no character has that number") from error


def format_yaml(tree: dict[str, Any]) -> str:
    """YAML text that ``read_yaml`` reads back to an equal mapping, keys in the given order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)
