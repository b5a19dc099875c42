"""One value of a configuration, from what a file or a command line says to its type."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_lpa.config.kernels import EARLIER_LOWDIM_PATHS
from megatron_lpa.config.paths import PATH_KEYS, expanded
from megatron_lpa.config.run import EARLIER_LAYOUTS
from megatron_lpa.config.schema import ByLayer, ConfigKey
from megatron_lpa.config.yaml_io import parse_yaml
from megatron_lpa.errors import UserError, named, shown
from megatron_lpa.structures.projection import PLAIN, layers_meant

MOST_CHARACTERS = 4096
"""Of a text: the longest path that Linux takes."""

MOST_WHOLE = 2**63 - 1
"""Sizes, counts and seeds become 64-bit integers."""

_EARLIER = {"parallel.lowdim_layout": EARLIER_LAYOUTS, "kernels.lowdim": EARLIER_LOWDIM_PATHS}
"""By key, values that earlier versions had, and what they are now."""

_NULLS = ("null", "Null", "NULL", "~")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NO_TEXT = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, ends of lines, and bytes that were not UTF-8."""


def typed(key: ConfigKey, value: Any, source: str) -> Any:
    """A value as its key's type.

    Numbers, booleans and ``null`` may also come as text, since a command line has nothing else.

    Args:
        key: whose value it is.
        value: as YAML or a command line gives it.
        source: where it was written, for messages.

    Raises:
        UserError: it is not of the type, not finite, too large, text that no file can be called, or a path
            that cannot be expanded.
    """
    if isinstance(value, str):
        _check_text(key.name, value, source)
        if key.optional and value.strip() in _NULLS:
            value = None
    if value is None and key.optional:
        return None
    if isinstance(value, str):
        value = _EARLIER.get(key.name, {}).get(value, value)
    if issubclass(key.base_type, dict) and isinstance(value, str):
        value = parse_yaml(value, f"{key.name} ({source})")
    try:
        found = _READERS[key.base_type](value)
    except (ValueError, OverflowError):
        found = None
    if key.base_type is ByLayer and found == {}:
        return None  # says of no layer that it is built otherwise
    if isinstance(found, int) and abs(found) > MOST_WHOLE:
        raise UserError(f"{key.name} is {shown(value)} ({source}) but must be below 2**63")
    if found is None or (key.choices and found not in key.choices):
        raise _wrong_type(key, value, source)
    if isinstance(found, dict):
        for name in found:
            _check_text(key.name, name, source)
    return _with_paths(key, found, source) if key.name in PATH_KEYS else found


def _with_paths(key: ConfigKey, value: Any, source: str) -> Any:
    """A path, or names that are paths, expanded; what came from a variable is checked like what was
    written."""
    if isinstance(value, str):
        path = expanded(value, f"{key.name} ({source})")
        _check_text(key.name, path, source)
        return path
    found: dict[str, float] = {}
    for name, number in value.items():
        path = _with_paths(key, name, source)
        if path in found:
            raise UserError(
                f"{key.name} ({source}) names {named(path)} twice, once it is expanded; name it once"
            )
        found[path] = number
    return found


def _wrong_type(key: ConfigKey, value: Any, source: str) -> UserError:
    quote = "; put it in quotes" if key.base_type is str and isinstance(value, (int, float)) else ""
    given = "null" if value is None else shown(value)
    return UserError(f"{key.name} is {given} ({source}) but must be {key.expected}{quote}")


def _check_text(name: str, text: str, source: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{name} is {shown(text)} ({source}), of {len(text):,} characters; {MOST_CHARACTERS:,} are the "
            "most"
        )
    if found := _NO_TEXT.search(text):
        raise UserError(
            f"{name} is {shown(text)} ({source}) but {shown(found[0])} has no place in it; leave it out, or "
            "rename what is called so"
        )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return _BOOLEANS.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    """An integer; ``51e9``, read as text or as a float, is one too."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if not isinstance(value, (str, float)):
        return None
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    if not number.is_finite() or number != number.to_integral_value():
        return None
    if number.adjusted() > 18:  # before an integer of that many digits is made
        return MOST_WHOLE + 1 if number > 0 else -MOST_WHOLE - 1
    return int(number)


def _float(value: Any) -> float | None:
    return None if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)


def _finite(value: Any) -> float | None:
    number = _float(value)
    return number if number is not None and math.isfinite(number) else None


def _numbers_by_name(value: Any) -> dict[str, float] | None:
    if not isinstance(value, dict):
        return None
    found = {name: _float(number) for name, number in value.items() if isinstance(name, str)}
    numbers = {name: number for name, number in found.items() if number is not None}
    return numbers if len(numbers) == len(value) else None


def _by_layer(value: Any) -> dict[str, int | str] | None:
    """Names of layers, which YAML may give as numbers, and a kind or a whole number; raises ValueError for
    other names."""
    if not isinstance(value, dict) or any(type(name) not in (int, str) for name in value):
        return None
    found: dict[str, int | str] = {}
    for name, built in value.items():
        rank = built if built in PLAIN else _whole(built)
        if rank is None or abs(rank if isinstance(rank, int) else 0) > MOST_WHOLE or str(name) in found:
            return None
        layers_meant(str(name))
        found[str(name)] = rank
    return found


_READERS: dict[type, Callable[[Any], Any]] = {
    str: _text,
    bool: _truth,
    int: _whole,
    float: _finite,
    dict: _numbers_by_name,
    ByLayer: _by_layer,
}
