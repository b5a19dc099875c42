"""Fetches wheels of what a GPU machine without network lacks, into a folder that travels there.

Runs where a package index can be reached, in the project's environment. Versions are those of
``constraints.txt``. DeepSpeed has no wheel on package indexes: it is built here, without any of its compiled
operators.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.gpu_packages import CARRIED, SOURCE_ONLY, normalised
from megatron_lpa.errors import EXIT_REFUSED, UserError

ROOT = Path(__file__).resolve().parents[1]
PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux1")
"""Of glibc 2.28 and older, which any present Linux is newer than."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("build/gpu_wheels"), metavar="FOLDER", help="default: build/gpu_wheels; its wheels are replaced")  # fmt: skip  # noqa: E501
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the GPU machine (default: 3.12)")
    parser.add_argument("--machine", default="x86_64", help="its architecture (default: x86_64)")
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME", help="further packages of constraints.txt")  # fmt: skip  # noqa: E501


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        for path in fetch(arguments):
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def fetch(arguments: argparse.Namespace) -> list[Path]:
    """The wheels in the folder, which then holds nothing else that pip could install.

    Raises:
        UserError: a version that is not pinned, an index that has none for that Python, or versions that do
            not match.
    """
    if not re.fullmatch(r"3\.\d+", arguments.python):
        raise UserError(f"--python {arguments.python}: write it as 3.12")
    names = dict.fromkeys(map(normalised, (*CARRIED, *arguments.add)))
    pins = pinned((ROOT / "constraints.txt").read_text(), names, arguments.python)
    target = ["--python-version", arguments.python, "--implementation", "cp"]
    for platform in PLATFORMS:
        target += ["--platform", f"{platform}_{arguments.machine}"]
    ready = [pin for name, pin in pins.items() if name not in SOURCE_ONLY]
    with tempfile.TemporaryDirectory() as work:
        pip(["download", "--only-binary=:all:", *target, "--dest", work, *ready])
        for name in SOURCE_ONLY:
            pip(["wheel", "--wheel-dir", work, pins[name]])
        check_pydantic(Path(work))
        return replaced(arguments.output, sorted(Path(work).glob("*.whl")))


def replaced(folder: Path, wheels: Sequence[Path]) -> list[Path]:
    """The wheels in a folder, in place of those that were there before.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.whl"):
            old.unlink()
        return [Path(shutil.copy(wheel, folder)) for wheel in wheels]
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error.strerror})") from error


def pinned(constraints: str, names: Sequence[str] | dict[str, None], python: str) -> dict[str, str]:
    """``name==version`` by name, for one Python version.

    Raises:
        UserError: names that ``constraints.txt`` does not pin.
    """
    lines = [line.partition("#")[0].strip() for line in constraints.splitlines()]
    found: dict[str, str] = {}
    for requirement in (Requirement(line) for line in lines if line):
        marker = requirement.marker
        if marker is None or marker.evaluate({"python_version": python}):
            found[normalised(requirement.name)] = f"{requirement.name}{requirement.specifier}"
    absent = [name for name in names if name not in found]
    if absent:
        raise UserError(f"constraints.txt pins no version of {', '.join(absent)} for Python {python}")
    return {name: found[name] for name in names}


def pip(words: list[str]) -> None:
    """Runs pip without dependencies.

    Raises:
        UserError: it failed; with its last line of error.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", words[0], "--no-deps", *words[1:]]  # fmt: skip  # noqa: E501
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise UserError(f"pip {words[0]} failed: {told[-1].removeprefix('ERROR: ')}")


def check_pydantic(folder: Path) -> None:
    """pydantic works with exactly one version of its compiled part, and refuses all others when it is
    imported.

    Raises:
        UserError: the two wheels do not belong together.
    """
    (path,) = folder.glob("pydantic-[0-9]*.whl")
    (core,) = folder.glob("pydantic_core-*.whl")
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = re.search(r"^Requires-Dist: pydantic[-_]core==(\S+)$", archive.read(name).decode(), re.M)
    if wanted is not None and core.name.split("-")[1] != wanted[1]:
        raise UserError(
            f"{path.name} needs pydantic-core {wanted[1]}, and {core.name} is another; mend constraints.txt"
        )


if __name__ == "__main__":
    sys.exit(main())
