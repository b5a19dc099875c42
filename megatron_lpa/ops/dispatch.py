"""Which path computes a low-dimensional product: measured profit decides, and without it what counting
proves.

Paths:

* ``eager``: two matrix products per pair, as PyTorch does them.
* ``joined``: pairs that read one x share the first product and the gradient of x (``ops/lowdim_math.py``).
* ``fused``: the two-product kernel (``kernels/lowdim_kernels.py``), which keeps the latent on chip.

``ops/tuning/sm_NN.json`` holds measured cases of one compute capability; ``docs/kernels.md`` says how they
are made. A case counts for its exact widths, and for numbers of tokens near the measured ones. Where a case
was measured on several devices of the capability, the lines of the device at hand count, by its name. Where
none counts, ``planning/product_time.py`` says where ``joined`` cannot lose; ``fused`` is never chosen without
a measurement.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_lpa import files
from megatron_lpa.config.kernels import EARLIER_LOWDIM_PATHS
from megatron_lpa.errors import UserError, named, shown
from megatron_lpa.kernels.tiles import FEW_TOKENS, MAX_PAIRS, Tile, default_tile, why_not
from megatron_lpa.planning.product_time import least_joined_tokens

PATHS = ("auto", "eager", "joined", "fused")
TUNING_FOLDER = Path(__file__).parent / "tuning"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NEAR = 4
"""A measured case counts for up to this many times fewer or more tokens; the largest also for all above, if
it is more than ``FEW_TOKENS``: what wins at decoding sizes says nothing about training."""

LEAST_ROWS = 64
"""Of an untuned tile where tokens are many. Every tile reads all factors from the L2 cache, so with fewer
rows plain products are far faster."""

# Functions under ``assume_constant_result`` run while torch.compile traces, which reads neither files nor the
# environment itself. They take and give plain tuples: objects that are made inside a trace do not exist
# there.


class Case(NamedTuple):
    """What a choice depends on, besides the number of tokens.

    Args:
        dtype: of x and the weights in the product.
        d_in: width of x.
        ranks: r of each pair.
        widths: d_out of each pair.
        norm: whether an RMSNorm comes before.
        training: whether a backward pass follows.
        rotary: whether rotary embedding of the first two outputs comes after.
    """

    dtype: torch.dtype
    d_in: int
    ranks: tuple[int, ...]
    widths: tuple[int, ...]
    norm: bool
    training: bool
    rotary: bool = False


class Plan(NamedTuple):
    """A path and, for ``fused``, how to cut.

    Args:
        path: one of ``PATHS``, never ``auto``.
        forward_tile: ``str`` of a ``Tile``; empty where joined products compute the outputs.
        backward_tile: the same for the gradient of x.
    """

    path: str
    forward_tile: str = ""
    backward_tile: str = ""


EAGER = Plan("eager")
JOINED = Plan("joined")


Measured = tuple[int, tuple[str, str, str]]
"""One line of a tuning table: a number of tokens, and the fields of the fastest ``Plan``."""


def choose(path: str, case: Case, tokens: int, device: torch.device) -> Plan:
    """The plan for one product.

    Args:
        path: one of ``PATHS``, from the configuration.
        case: widths, dtype and what is asked for.
        tokens: M, rows of x.
        device: of x.

    Raises:
        UserError: no such path, or one that cannot run here.
    """
    if path not in PATHS:
        raise UserError(f"the low-dimensional path is {path!r}; give one of {', '.join(PATHS)}")
    if path == "fused":
        return forced_fused(case, tokens, device)
    if path != "auto":
        return Plan(path)
    if device.type != "cuda":
        return EAGER
    return planned(measured_cases((*case,), device.index or 0), case, tokens)


kept_choice = functools.lru_cache(maxsize=4096)(choose)
"""``choose``, asked once: a model's modules ask for a few cases at every step."""


def forget_tables() -> None:
    """Tables are read again, for a process that has written one."""
    read_table.cache_clear()
    kept_choice.cache_clear()


def planned(measured: Sequence[Measured], case: Case, tokens: int) -> Plan:
    """The plan of the nearest measured case, else ``joined`` where it cannot lose, else ``eager``.

    Args:
        measured: lines of the case, by rising number of tokens; perhaps none.
        case: what is computed.
        tokens: M. Only compared, so that torch.compile can leave it open.
    """
    found = nearest(measured, tokens) if measured else None
    if found is not None:
        return found
    return JOINED if case.training and tokens >= joined_from((*case,)) else EAGER


@torch.compiler.assume_constant_result
def joined_from(case: tuple[Any, ...]) -> int:
    """Tokens from which a case is computed by joined products if nothing was measured."""
    wanted = Case(*case)
    return least_joined_tokens(wanted.d_in, wanted.ranks, wanted.widths, wanted.dtype.itemsize)


def nearest(measured: Sequence[Measured], tokens: int) -> Plan | None:
    """The plan of the measured case with the nearest number of tokens, None if none is near.

    Args:
        measured: by rising number of tokens, at least one.
        tokens: as in ``planned``.
    """
    best, plan = measured[0]
    for above, plan_above in measured[1:]:
        if tokens * tokens > best * above:  # nearer in the logarithm
            best, plan = above, plan_above
    open_above = best == measured[-1][0] and best > FEW_TOKENS
    if tokens * NEAR < best or (tokens > best * NEAR and not open_above):
        return None
    return Plan(*plan)


def why_not_fused(case: Case, device_type: str) -> str | None:
    """The reason why no kernel can compute a case, whatever its tiles, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type != "cuda":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"x is on {device_type}, and the kernel needs a GPU (or TRITON_INTERPRET=1)"
        # Not by its distribution's name, which differs among builds of PyTorch.
        if reason := why_no_interpreter(importlib.import_module("triton").__version__, np.__version__):
            return reason
    if case.dtype not in KERNEL_DTYPES:
        return f"{case.dtype} is not one of its dtypes"
    if len(case.ranks) > MAX_PAIRS:
        return f"{len(case.ranks)} pairs are more than {MAX_PAIRS}"
    if len(set(case.ranks)) > 1:
        return f"the pairs' ranks {case.ranks} differ"
    return None


def why_no_interpreter(triton_version: str, numpy_version: str) -> str | None:
    """The reason why Triton's interpreter cannot run beside this NumPy, or None: up to 3.6 it makes Python
    numbers of arrays with one element, which NumPy allows no more since 2.4."""

    def at_least(found: str, least: tuple[int, int]) -> bool:
        major, minor, *_ = found.split(".")
        return (int(major), int(minor)) >= least

    if at_least(triton_version, (3, 7)) or not at_least(numpy_version, (2, 4)):
        return None
    return (
        f"the interpreter of Triton {triton_version} does not work with NumPy {numpy_version}; install "
        "numpy<2.4, or Triton 3.7 or newer"
    )


@torch.compiler.assume_constant_result
def default_tiles(case: tuple[Any, ...], few: bool, device_type: str, index: int) -> tuple[str, str]:
    """Tiles of the fused plan for a case without a measured one.

    Raises:
        UserError: the kernel cannot run.
    """
    wanted = Case(*case)
    reason = why_not_fused(wanted, device_type)
    size, rank = wanted.dtype.itemsize, wanted.ranks[0]
    capability = torch.cuda.get_device_capability(index) if device_type == "cuda" else (9, 0)
    tokens, rows = (1, 1) if few else (FEW_TOKENS + 1, LEAST_ROWS)

    def tile_of(latents: int, rotary: bool) -> Tile | None:
        tile = default_tile(tokens, rank, latents, size, capability, rotary)
        return None if tile is None or tile.block_m < rows else tile

    tile = None if reason else tile_of(1, wanted.rotary)
    if tile is None:
        least, smaller = (
            ("", "") if few else (f" of {LEAST_ROWS} rows or more", "; smaller ones lose to plain products")
        )
        reason = reason or f"no tile{least} fits the device at r = {rank}{smaller}"
        raise UserError(f"the low-dimensional path 'fused' cannot run: {reason}; use 'auto' (kernels.lowdim)")
    backward = tile_of(len(wanted.ranks), False)
    return str(tile), "" if backward is None else str(backward)


def forced_fused(case: Case, tokens: int, device: torch.device) -> Plan:
    """The measured fused plan where there is one, else one with default tiles.

    Raises:
        UserError: the kernel cannot run.
    """
    index = device.index or 0
    if device.type == "cuda":
        fused = [m for m in measured_cases((*case,), index) if m[1][0] == "fused"]
        plan = nearest(fused, tokens) if fused else None
        if plan is not None:
            return plan
    # A branch torch.compile can guard; a comparison's result it would not pass on.
    few = False
    if tokens <= FEW_TOKENS:
        few = True
    return Plan("fused", *default_tiles((*case,), few, device.type, index))


@torch.compiler.assume_constant_result
def measured_cases(case: tuple[Any, ...], index: int) -> Sequence[Measured]:
    """The table's lines for a case on GPU ``index``."""
    capability, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
    return read_table(capability, name).get(Case(*case), ())


def table_path(capability: tuple[int, int]) -> Path:
    """Where the table of a compute capability lies."""
    return TUNING_FOLDER / f"sm_{capability[0]}{capability[1]}.json"


@functools.cache
def read_table(capability: tuple[int, int], device: str) -> dict[Case, tuple[Measured, ...]]:
    """The lines for a device by case; empty for one without a table.

    Raises:
        UserError: the table is not as it is written.
        TryAgain: the disk does not give it.
    """
    path = table_path(capability)
    if not files.is_file(path):
        return {}
    return parse_table(files.from_disk(lambda: files.read_json(path), path), path, capability, device)


def parse_table(
    content: Any, path: Path, capability: tuple[int, int], device: str
) -> dict[Case, tuple[Measured, ...]]:
    """Checks a table's lines, and takes those for a device.

    Args:
        content: the table.
        path: where it was read, for messages.
        capability: of the device.
        device: its name. Of each case only the lines of this name count, if there are any: devices of one
            capability differ in bandwidth. A case measured on others only is still better than none.

    Returns:
        by case, lines by rising number of tokens.

    Raises:
        UserError: no table, a line that names no path, or a tile that cannot run.
    """
    table: dict[Case, list[Measured]] = {}
    own: dict[Case, list[Measured]] = {}
    cases = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(cases, list):
        raise UserError(f"{path}: not a tuning table, which has a list of cases; copy the file again")
    for number, line in enumerate(cases, start=1):
        where = f"{path}, case {number}"
        try:
            case, measured = _read_line(line, where, capability)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError) as error:
            told = f"{type(error).__name__}: {named(error)}"
            raise UserError(f"{where}: not a line of a tuning table ({told}); copy the file again") from error
        table.setdefault(case, []).append(measured)
        if line.get("device") == device:
            own.setdefault(case, []).append(measured)
    return {case: tuple(sorted(lines)) for case, lines in (table | own).items()}


def _read_line(line: dict[str, Any], where: str, capability: tuple[int, int]) -> tuple[Case, Measured]:
    """Raises UserError where a plan cannot run, and Python's own errors where a line is none."""
    path = EARLIER_LOWDIM_PATHS.get(line["path"], line["path"])
    plan = Plan(path, line.get("forward_tile", ""), line.get("backward_tile", ""))
    if plan.path not in PATHS[1:]:
        raise UserError(f"{where}: the path is {shown(plan.path)}; give one of {', '.join(PATHS[1:])}")
    dtype = getattr(torch, line["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {shown(line['dtype'])}")
    ranks, widths = tuple(line["ranks"]), tuple(line["widths"])
    for key, numbers in (
        ("ranks", ranks),
        ("widths", widths),
        ("d_in, tokens", (line["d_in"], line["tokens"])),
    ):
        if not numbers or any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError(f"{key}: {shown(numbers)}")
    rotary = line.get("rotary", False)
    for key, flag in (("norm", line["norm"]), ("training", line["training"]), ("rotary", rotary)):
        if not isinstance(flag, bool):
            raise TypeError(f"{key} is {shown(flag)}")
    for text, latents, rotates in (
        (plan.forward_tile, 1, rotary),
        (plan.backward_tile, len(ranks), False),
    ):
        reason = text and why_not(Tile.parse(text), max(ranks), latents, dtype.itemsize, capability, rotates)
        if reason:
            raise UserError(f"{where}: tile {text} cannot run: {reason}")
    if (plan.path == "fused") != bool(plan.forward_tile or plan.backward_tile):
        raise UserError(f"{where}: tiles go with the path 'fused', and only with it")
    case = Case(dtype, line["d_in"], ranks, widths, line["norm"], line["training"], rotary)
    return case, (line["tokens"], (plan.path, plan.forward_tile, plan.backward_tile))
