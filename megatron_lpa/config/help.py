"""The text of ``--help``."""

from __future__ import annotations

import textwrap

from megatron_lpa.config.presets import preset_names
from megatron_lpa.config.schema import CONFIG_KEYS, ConfigKey

_USAGE = """\
usage: python -m megatron_lpa.pretrain [--preset FAMILY/VARIANT] [--config FILE.yaml] [--KEY VALUE ...]

Later sources win: defaults, --preset, --config, then --KEY VALUE or --KEY=VALUE from this list.
train.steps, train.tokens and train.epochs are one choice: setting one replaces a preset's.

options:
  --preset FAMILY/VARIANT  a shipped model and recipe; names below
  --config FILE.yaml       a whole or partial configuration, such as a run folder's config.yaml
  --print-config           print the resolved configuration as YAML and exit
  -h, --help               print this text and exit
"""


def _entry(key: ConfigKey) -> str:
    kind = "{" + ",".join(key.choices) + "}" if key.choices else key.base_type.__name__.upper()
    default = (
        "empty" if key.default is None else str(key.default).lower() if key.base_type is bool else key.default
    )
    body = textwrap.fill(
        f"{key.doc} (default: {default})".strip(), 100, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return f"  --{key.name} {kind}\n{body}"


def help_text() -> str:
    """Every option, key with its documentation and default, and preset name."""
    parts = [_USAGE]
    section = ""
    for key in CONFIG_KEYS.values():
        head = key.name.partition(".")[0]
        if head != section:
            section = head
            parts.append(f"{section}:")
        parts.append(_entry(key))
    presets = textwrap.fill(", ".join(preset_names()), 100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*parts, "", "presets:", presets])
