"""Presets: ``presets/<family>.yaml`` holds a ``base`` and small ``variants`` on top of it.

A preset's name is ``family/variant``. Top-level keys of a file: ``base`` and each entry of
``variants`` are partial run configurations; ``shared`` only gives YAML anchors a place.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from megatron_lpa.config.schema import nearest
from megatron_lpa.config.yaml_io import read_yaml
from megatron_lpa.errors import UserError, shown
from megatron_lpa.files import names_in

PRESET_DIR = Path(str(resources.files("megatron_lpa"))) / "presets"


def _variants(family: str) -> dict[str, Any]:
    variants = read_yaml(PRESET_DIR / f"{family}.yaml").get("variants", {})
    assert isinstance(variants, dict)
    return variants


def preset_names() -> list[str]:
    """Every ``family/variant``, families in alphabetical order, variants in the file's order."""
    families = [name[:-5] for name in names_in(PRESET_DIR) if name.endswith(".yaml")]
    return [f"{family}/{variant}" for family in families for variant in _variants(family)]


def preset_trees(name: str) -> list[tuple[str, dict[str, Any]]]:
    """The partial configurations of a preset, weakest first, each with where it was written.

    Raises:
        UserError: there is no such preset; the message lists the nearest names and all of them.
    """
    names = preset_names()
    if name not in names:
        family = name.partition("/")[0]
        guesses = [n for n in names if n.startswith(f"{family}/")] if "/" not in name else []
        guesses = guesses or nearest(name, names)[:3]
        did_you_mean = f"did you mean {', '.join(guesses)}? " if guesses else ""
        raise UserError(f"unknown preset {shown(name)}; {did_you_mean}available: {', '.join(names)}")
    family, _, variant = name.partition("/")
    path = PRESET_DIR / f"{family}.yaml"
    tree = read_yaml(path)
    assert set(tree) <= {"shared", "base", "variants"}, f"{path.name}: unexpected {set(tree)}"
    layers = [
        (f"{path.name}, base", tree.get("base")),
        (f"{path.name}, {variant}", tree["variants"][variant]),
    ]
    return [(source, values or {}) for source, values in layers]
