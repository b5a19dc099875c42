"""The checks of ``data.*``, and those of paths that other checks use too."""

from __future__ import annotations

import math

from megatron_lpa.config.run import DataConfig
from megatron_lpa.errors import UserError, named, shown
from megatron_lpa.number_checks import positive

MOST_NAME_BYTES = 200
"""Of a file's or folder's name; Linux takes 255, and suffixes come to it."""

MOST_PATH_BYTES = 3000
"""Of a path; Linux takes 4,095, and names inside come to it."""


def check_path(key: str, path: str) -> None:
    """Raise unless files can be called so on Linux.

    Args:
        key: whose value it is.
        path: relative or absolute; suffixes of up to 20 bytes may be added to it.
    """
    parts = [part.encode(errors="surrogateescape") for part in path.split("/")]
    longest = max(len(part) for part in parts)
    if not path or longest > MOST_NAME_BYTES or len(path.encode(errors="surrogateescape")) > MOST_PATH_BYTES:
        raise UserError(
            f"{key} is {shown(path)} but must be a path of at most {MOST_PATH_BYTES:,} bytes, with names of "
            f"at most {MOST_NAME_BYTES} bytes between its '/'"
        )


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
    if (
        len(numbers) != 3
        or not all(n >= 0 for n in numbers)
        or not math.isfinite(sum(numbers))
        or numbers[0] == 0
    ):
        raise UserError(
            f"data.split is {shown(data.split)} but must be three shares for train, valid and test, none "
            "negative "
            'and the first above 0, such as "969,30,1"'
        )
    if data.blend is not None:
        _check_blend(data.blend)
    kinds = {key: getattr(data, key) for key in ("prefix", "blend", "train_prefix")}
    given = [f"data.{key} {named(value)}" for key, value in kinds.items() if value is not None]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} exclude each other: data.prefix and data.blend are cut by data.split, "
            "data.train_prefix is used whole; set all but one of them to null"
        )
    for name in ("valid_prefix", "test_prefix"):
        value = getattr(data, name)
        if value is not None and data.train_prefix is None:
            raise UserError(
                f"data.{name} is {named(value)} but data.train_prefix is empty; set data.train_prefix too, "
                "or use data.prefix or data.blend with data.split"
            )
    if need_data and not given:
        raise UserError(
            "data.prefix, data.blend and data.train_prefix are all empty; set data.prefix to the path of a "
            "dataset without .bin or .idx (tools/preprocess_data.py makes one), or one of the others"
        )
    for name in ("prefix", "train_prefix", "valid_prefix", "test_prefix", "cache_dir", "tokenizer"):
        if (path := getattr(data, name)) is not None:
            check_path(f"data.{name}", path)
    if not 0 <= data.document_seed < 1 << 63:
        raise UserError(f"data.document_seed is {data.document_seed} but must be at least 0 and below 2**63")
    positive("data.index_timeout_s", data.index_timeout_s)


def _check_blend(blend: dict[str, float]) -> None:
    if not blend:
        raise UserError('data.blend is {} but needs at least one dataset, as {"data/a": 0.7, "data/b": 0.3}')
    for prefix, weight in blend.items():
        if not isinstance(prefix, str) or not prefix:
            raise UserError(f"data.blend has {shown(prefix)} for a dataset; put its prefix in quotes")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"data.blend gives {named(prefix)} the weight {weight} but weights must be above 0; leave "
                "out a dataset that is not to be read"
            )
        check_path("data.blend", prefix)
    if not math.isfinite(sum(blend.values())):
        raise UserError(
            "data.blend has weights whose sum is not finite; only their ratios count, so divide all of them"
        )
