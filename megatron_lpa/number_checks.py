"""Checks of single numbers that a user gives: a message names the key and what the value must be."""

from __future__ import annotations

import math

from megatron_lpa.errors import UserError, shown

MOST_SIZE = 2**31 - 1
"""Of a dimension, and of a batch: kernels count in 32 bits."""

FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)
"""The smallest number above 0 that float32 holds in full, and the largest: what computes is no wider."""


def at_least(key: str, value: float, least: float) -> None:
    """Raise unless ``value`` is ``least`` or more, and float32 holds it."""
    if not value >= least:  # also false for NaN
        raise UserError(f"{key} is {shown(value)} but must be at least {least}")
    at_most(key, value, FLOAT32[1])


def at_most(key: str, value: float, most: float, hint: str = "") -> None:
    """Raise unless ``value`` is ``most`` or less; ``hint`` is what to do."""
    if not value <= most:
        words = f"{most:,}" if isinstance(most, int) else f"{most:.6g}"
        raise UserError(f"{key} is {shown(value)} but must be at most {words}{hint and '; '}{hint}")


def positive(key: str, value: float) -> None:
    """Raise unless ``value`` is above 0 and finite, also in float32."""
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{key} is {shown(value)} but must be above 0")
    at_most(key, value, FLOAT32[1])
    if value < FLOAT32[0]:
        raise UserError(f"{key} is {shown(value)} but must be at least {FLOAT32[0]:.6g}: in float32 it is 0")


def divisors(number: int, limit: int = 1024) -> str:
    """All of them up to a limit, for a message."""
    return ", ".join(str(n) for n in range(1, min(number, limit) + 1) if number % n == 0)
