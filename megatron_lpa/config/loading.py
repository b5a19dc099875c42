"""From a command line to a ``RunConfig``, and from a ``RunConfig`` to YAML and back.

Precedence, weakest first: dataclass defaults, the preset family's base, the preset's variant, the
``--config`` file, the command line. Of the environment only the variables are read that paths name
(``paths.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_type_hints

from megatron_lpa.config.help import help_text
from megatron_lpa.config.known import check_key, check_option, read_config_file
from megatron_lpa.config.paths import PATH_KEYS, escaped, expanded
from megatron_lpa.config.presets import preset_trees
from megatron_lpa.config.run import RunConfig
from megatron_lpa.config.schema import CONFIG_KEYS, CONFIG_SECTIONS
from megatron_lpa.config.values import typed
from megatron_lpa.config.yaml_io import format_yaml
from megatron_lpa.errors import UserError, shown
from megatron_lpa.files import write_whole

LENGTH_KEYS = ("train.steps", "train.tokens", "train.epochs")
"""One choice in three spellings: a stronger source's length replaces a weaker source's."""

_LAUNCHER_OPTIONS = ("--local_rank", "--local-rank")


@dataclass
class _CommandLine:
    preset: str | None = None
    config: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    print_config: bool = False
    help: bool = False


def load_config(argv: Sequence[str]) -> RunConfig:
    """Resolve ``--preset``, ``--config`` and dotted overrides into one typed configuration.

    ``--help`` prints every key and exits with 0; ``--print-config`` prints the resolved YAML and
    exits with 0. ``--local_rank``, which launchers append, is ignored. Keys are checked one by one
    here; ``validate_config`` checks them against each other. ``~`` and variables in paths are expanded.

    Raises:
        UserError: an unknown option, key or preset (with the nearest known names), a value of the
            wrong type (with what was expected), or a file that cannot be used.
        TryAgain: the disk does not give the file.
    """
    command = _parse_command_line(argv)
    if command.help:
        print(help_text())
        sys.exit(0)
    layers: list[tuple[str, dict[str, Any]]] = []
    if command.preset is not None:
        layers += [(source, _flatten(tree, source)) for source, tree in preset_trees(command.preset)]
    if command.config is not None:
        path = expanded(command.config, "--config")
        layers.append((path, _flatten(read_config_file(path), path)))
    layers.append(("command line", dict(command.overrides)))

    config = _build(_merge(layers))
    if config.logging.name is None:
        name = "run" if command.preset is None else command.preset.replace("/", "-")
        config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, name=name))
    if command.print_config:
        print(_yaml_of(config), end="")
        sys.exit(0)
    return config


def config_from_tree(tree: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration that ``dataclasses.asdict`` gave ``tree`` for, perhaps in an earlier version.

    Keys that are missing have their defaults.

    Args:
        tree: section by section, as a manifest has it.
        source: where it is from, for messages.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    flat = _flatten(tree, source)
    return _build(_merge([(source, {key: _meant(key, value) for key, value in flat.items()})]))


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write ``config`` as YAML that ``load_config(["--config", path])`` reads back to an equal object.

    The file appears whole or not at all, with the permissions that the umask gives. Its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    write_whole(path, _yaml_of(config))


def _yaml_of(config: RunConfig) -> str:
    """The resolved configuration. Paths are expanded already: what stands in them stays as it is when they
    are read."""
    tree = dataclasses.asdict(config)
    for name in PATH_KEYS:
        section, _, key = name.partition(".")
        tree[section][key] = _meant(name, tree[section][key])
    return format_yaml(tree)


def _meant(key: str, value: Any) -> Any:
    """A value as it has to be written to be read as it is."""
    if key not in PATH_KEYS:
        return value
    if isinstance(value, dict):
        return {escaped(path) if isinstance(path, str) else path: number for path, number in value.items()}
    return escaped(value) if isinstance(value, str) else value


def _remove_leftovers(path: Path) -> None:
    """Remove what earlier versions left when they were killed: files with eight random characters after the
    name."""
    of_random_name = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}")
    with contextlib.suppress(OSError):
        for leftover in path.parent.iterdir():
            if of_random_name.fullmatch(leftover.name) and stat.S_ISREG(leftover.lstat().st_mode):
                leftover.unlink()


def _parse_command_line(argv: Sequence[str]) -> _CommandLine:
    command = _CommandLine()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") and word != "-h":
            raise UserError(f"unexpected argument {shown(word)}; write options as --key value (see --help)")
        option, equals, value = word.partition("=")
        if option in ("-h", "--help", "--print-config"):
            if equals:
                raise UserError(f"{option} takes no value")
            command.help |= option != "--print-config"
            command.print_config |= option == "--print-config"
            continue
        if option not in ("--preset", "--config", *_LAUNCHER_OPTIONS):
            check_option(option[2:])
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"{option} needs a value: {option} <value>")
            value = words.pop(0)
        if option == "--preset":
            command.preset = value
        elif option == "--config":
            command.config = value
        elif option not in _LAUNCHER_OPTIONS:
            command.overrides[option[2:]] = value
    return command


def _flatten(tree: Mapping[Any, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """``{"model": {"hidden_size": 8}}`` to ``{"model.hidden_size": 8}``; raises for unknown keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in CONFIG_SECTIONS and isinstance(value, dict):
            flat |= _flatten(value, source, f"{key}.")
        elif key in CONFIG_SECTIONS and value is None:  # a section whose every line is commented out
            continue
        else:
            check_key(key, source, holds_keys=isinstance(value, dict))
            flat[key] = value
    return flat


def _merge(layers: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, tuple[Any, str]]:
    """Later layers win; every value keeps the name of its source for error messages."""
    merged: dict[str, tuple[Any, str]] = {}
    for source, values in layers:
        if any(values.get(key) not in (None, "null") for key in LENGTH_KEYS):
            for key in LENGTH_KEYS:
                merged.pop(key, None)
        merged |= {key: (value, source) for key, value in values.items()}
    return merged


def _build(merged: Mapping[str, tuple[Any, str]]) -> RunConfig:
    values = {key: typed(CONFIG_KEYS[key], value, source) for key, (value, source) in merged.items()}
    return cast(RunConfig, _construct(RunConfig, _nest(values)))


def _construct(cls: type, tree: Mapping[str, Any]) -> Any:
    """A dataclass with what ``tree`` has of its fields, inner dataclasses likewise."""
    hints = get_type_hints(cls)
    return cls(
        **{
            name: _construct(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in tree.items()
        }
    )


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree
