"""What the GPU suite needs installed: the one list that ``gpu_wheels`` fetches by and ``gpu_call`` checks by.

Standard library only: both run before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_lpa.errors import UserError

CARRIED = (
    "deepspeed", "hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
    "typing-extensions",
)  # fmt: skip
"""Distributions that a machine with PyTorch usually lacks, or has in a version that the others are too new
for; they travel as wheels, and go before what is installed."""

EXPECTED = (
    "torch", "triton", "numpy", "transformers", "pytest", "pytest-xdist", "pytest-timeout", "psutil",
    "pyyaml",
    "safetensors", "ninja", "einops", "msgpack", "py-cpuinfo", "tqdm", "packaging",
)  # fmt: skip
"""Distributions that such a machine has. One that it lacks can be put into the folder of wheels, too."""

SOURCE_ONLY = ("deepspeed",)
"""Carried ones that package indexes hold no wheel of; the wheel is built, and is pure Python."""

CAPABILITIES = ((8, 0), (9, 0))
"""Compute capabilities that the kernels have tiles and a tuning table for."""


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> set[str]:
    """Normalised names of all distributions that this Python finds."""
    names = (found.metadata["Name"] for found in importlib.metadata.distributions())
    return {normalised(name) for name in names if name}


def wheels_by_name(folder: Path) -> dict[str, Path]:
    """The wheel of each distribution in a folder, by normalised name.

    Raises:
        UserError: no such folder, two wheels of one distribution, or wheels that this Python cannot install.
    """
    if not folder.is_dir():
        raise UserError(f"--wheels {folder}: no such folder; python -m benchmarks.gpu_wheels makes it")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.whl")):
        name = normalised(path.name.split("-")[0])
        if name in found:
            raise UserError(f"{folder}: two wheels of {name}, {found[name].name} and {path.name}; remove one")
        found[name] = path
    foreign = [path.name for path in found.values() if not runs_here(path.name)]
    if foreign:
        raise UserError(
            f"{folder}: wheels for another Python or machine than this one ({platform.python_version()}, "
            f"{platform.machine()}): {', '.join(foreign)}; fetch them with python -m benchmarks.gpu_wheels "
            f"--python {version_here()}"
        )
    return found


def version_here() -> str:
    """This Python's version as ``3.12``."""
    return ".".join(platform.python_version_tuple()[:2])


def runs_here(wheel_name: str) -> bool:
    """Whether a wheel's tags fit this Python on Linux; pip looks again, and more closely."""
    pythons, abis, platforms = wheel_name.removesuffix(".whl").split("-")[-3:]
    here = "cp" + version_here().replace(".", "")
    pure = "py3" in pythons.split(".") and "none" in abis.split(".")
    own = here in pythons.split(".") and {here, "abi3", "none"} & set(abis.split("."))
    machine = platforms == "any" or platforms.endswith(f"_{platform.machine()}")
    return bool(pure or own) and machine


def to_install(here: Iterable[str], wheels: dict[str, Path]) -> list[Path]:
    """The wheels that are unpacked: all that are carried, and those of what is not installed.

    Args:
        here: normalised names of what is.
        wheels: as ``wheels_by_name`` finds them.

    Raises:
        UserError: some distributions are neither installed nor there as a wheel; all are named.
    """
    missing = sorted(set(CARRIED + EXPECTED) - set(here))
    lacking = [name for name in missing if name not in wheels]
    if lacking:
        further = " ".join(name for name in lacking if name not in CARRIED)
        raise UserError(
            f"neither installed nor among the wheels: {', '.join(lacking)}; where a package index can be "
            "reached: python -m benchmarks.gpu_wheels --python "
            f"{version_here()}{' --add ' if further else ''}{further}"
        )
    return [wheels[name] for name in sorted({*missing, *(set(CARRIED) & set(wheels))})]
