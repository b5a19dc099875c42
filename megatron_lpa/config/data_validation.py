"""The checks of ``data.*``, and those of single numbers that other checks use too."""

from __future__ import annotations

import math

from megatron_lpa.config.run import DataConfig
from megatron_lpa.errors import UserError


def at_least(key: str, value: float, least: float) -> None:
    """Raise unless ``value`` is ``least`` or more."""
    if not value >= least:  # also false for NaN
        raise UserError(f"{key} is {value} but must be at least {least}")


def positive(key: str, value: float) -> None:
    """Raise unless ``value`` is above 0 and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{key} is {value} but must be above 0")


def check_data(data: DataConfig, need_data: bool) -> None:
    """Check where the data comes from and how it is cut.

    Raises:
        UserError: a value, or a combination of values, that cannot work.
    """
    shares = data.split.split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(n >= 0 and math.isfinite(n) for n in numbers) or numbers[0] == 0:
        raise UserError(
            f"data.split is {data.split!r} but must be three shares for train, valid and test, none negative "
            'and the first above 0, such as "969,30,1"'
        )
    if data.blend is not None:
        _check_blend(data.blend)
    kinds = {key: getattr(data, key) for key in ("prefix", "blend", "train_prefix")}
    given = [f"data.{key} {value}" for key, value in kinds.items() if value is not None]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} exclude each other: data.prefix and data.blend are cut by data.split, "
            "data.train_prefix is used whole; set all but one of them to null"
        )
    for name in ("valid_prefix", "test_prefix"):
        value = getattr(data, name)
        if value is not None and data.train_prefix is None:
            raise UserError(
                f"data.{name} is {value} but data.train_prefix is empty; set data.train_prefix too, or use "
                "data.prefix or data.blend with data.split"
            )
    if need_data and not given:
        raise UserError(
            "data.prefix, data.blend and data.train_prefix are all empty; set data.prefix to the path of a "
            "dataset without .bin or .idx (tools/preprocess_data.py makes one), or one of the others"
        )
    if not 0 <= data.document_seed < 1 << 63:
        raise UserError(f"data.document_seed is {data.document_seed} but must be at least 0 and below 2**63")
    positive("data.index_timeout_s", data.index_timeout_s)


def _check_blend(blend: dict[str, float]) -> None:
    if not blend:
        raise UserError('data.blend is {} but needs at least one dataset, as {"data/a": 0.7, "data/b": 0.3}')
    for prefix, weight in blend.items():
        if not isinstance(prefix, str) or not prefix:
            raise UserError(f"data.blend has {prefix!r} for a dataset; put its prefix in quotes")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"data.blend gives {prefix} the weight {weight} but weights must be above 0; leave out a dataset "
                "that is not to be read"
            )
