"""Wheels for a GPU machine without network: which ones, and what is said where they do not fit."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_packages, gpu_wheels
from benchmarks.commands import ROOT
from benchmarks.gpu_packages import CARRIED, EXPECTED, runs_here, to_install, wheels_by_name
from megatron_lpa.errors import UserError
from megatron_lpa.ops.dispatch import TUNING_FOLDER

HERE = gpu_packages.version_here().replace(".", "")
WHEELS = {
    "deepspeed": "deepspeed-0.19.8-py3-none-any.whl",
    "hjson": "hjson-3.1.0-py3-none-any.whl",
    "pydantic": "pydantic-2.14.3-py3-none-any.whl",
    "pydantic-core": f"pydantic_core-2.50.4-cp{HERE}-cp{HERE}-manylinux_2_17_{platform.machine()}.whl",
    "annotated-types": "annotated_types-0.8.0-py3-none-any.whl",
    "typing-inspection": "typing_inspection-0.4.5-py3-none-any.whl",
    "typing-extensions": "typing_extensions-4.16.0-py3-none-any.whl",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in WHEELS.values():
        (tmp_path / name).touch()
    return tmp_path


def test_what_is_carried_goes_before_what_is_installed_and_nothing_else_does(folder: Path) -> None:
    """An older typing-extensions, as Linux distributions have it, would keep pydantic from being imported."""
    (folder / "tqdm-4.67.0-py3-none-any.whl").touch()
    chosen = to_install({*EXPECTED, "hjson", "typing-extensions"}, wheels_by_name(folder))
    assert {path.name for path in chosen} == set(WHEELS.values())
    assert to_install({*EXPECTED, *CARRIED}, {}) == []


def test_all_that_is_missing_is_named(folder: Path) -> None:
    (folder / WHEELS["hjson"]).unlink()
    (folder / WHEELS["pydantic-core"]).unlink()
    with pytest.raises(UserError, match=r"wheels: hjson, pydantic-core, tqdm; .* --add tqdm$"):
        to_install(set(EXPECTED) - {"tqdm"}, wheels_by_name(folder))


def test_wheels_that_cannot_be_installed_together_or_here(folder: Path, tmp_path: Path) -> None:
    (folder / "hjson-3.0.0-py3-none-any.whl").touch()
    with pytest.raises(UserError, match=r"two wheels of hjson, hjson-3.0.0.*and hjson-3.1.0"):
        wheels_by_name(folder)
    (folder / "hjson-3.0.0-py3-none-any.whl").unlink()
    (folder / WHEELS["pydantic-core"]).rename(
        folder / "pydantic_core-2.50.4-cp39-cp39-manylinux_2_17_x86_64.whl"
    )
    with pytest.raises(UserError, match=r"another Python or machine .*: pydantic_core-2.50.4-cp39"):
        wheels_by_name(folder)
    with pytest.raises(UserError, match=r"no such folder; python -m benchmarks\.gpu_wheels makes it"):
        wheels_by_name(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        (f"cp{HERE}-cp{HERE}-manylinux2014_{platform.machine()}.manylinux_2_17_{platform.machine()}", True),
        (f"cp{HERE}-abi3-manylinux_2_28_{platform.machine()}", True),
        (f"cp{HERE}-cp{HERE}-win_amd64", False),
        (f"cp{HERE}-cp{HERE}t-manylinux_2_28_{platform.machine()}", False),
        ("py2-none-any", False),
    ],
)
def test_tags(tags: str, fits: bool) -> None:
    assert runs_here(f"name-1.0-{tags}.whl") is fits


def test_versions_are_pinned_for_the_other_python() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pins = gpu_wheels.pinned(text, CARRIED, "3.12")
    assert list(pins) == list(CARRIED) and all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins.values())
    split = "numpy==2.2.6 ; python_version < '3.11'\nnumpy==2.4.6 ; python_version >= '3.11'  # a comment\n"
    assert gpu_wheels.pinned(split, ["numpy"], "3.10") == {"numpy": "numpy==2.2.6"}
    assert gpu_wheels.pinned(split, ["numpy"], "3.12") == {"numpy": "numpy==2.4.6"}
    with pytest.raises(UserError, match=r"pins no version of hjson, msgpack for Python 3.12"):
        gpu_wheels.pinned(split, ["numpy", "hjson", "msgpack"], "3.12")


def test_pydantic_and_its_compiled_part_belong_together(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / WHEELS["pydantic"], "w") as archive:
        archive.writestr("pydantic-2.14.3.dist-info/METADATA", "Requires-Dist: pydantic-core==2.50.4\n")
    (tmp_path / WHEELS["pydantic-core"]).touch()
    gpu_wheels.check_pydantic(tmp_path)
    (tmp_path / WHEELS["pydantic-core"]).rename(
        tmp_path / WHEELS["pydantic-core"].replace("2.50.4", "2.50.5")
    )
    with pytest.raises(UserError, match=r"needs pydantic-core 2.50.4, and pydantic_core-2.50.5"):
        gpu_wheels.check_pydantic(tmp_path)


def test_a_failed_fetch_is_one_line_and_leaves_older_wheels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: slow\nERROR: No matching distribution for x\n"
        )

    monkeypatch.setattr(gpu_wheels.subprocess, "run", refuse)
    assert gpu_wheels.main(["--output", str(folder)]) == 78
    assert capsys.readouterr().err == "error: pip download failed: No matching distribution for x\n"
    assert len(list(folder.glob("*.whl"))) == len(WHEELS)
    assert gpu_wheels.main(["--output", str(folder), "--python", "312"]) == 78
    assert "write it as 3.12" in capsys.readouterr().err


def test_each_capability_has_a_tuning_table() -> None:
    names = {f"sm_{major}{minor}.json" for major, minor in gpu_packages.CAPABILITIES}
    assert names == {path.name for path in TUNING_FOLDER.glob("sm_*.json")}


def test_the_call_needs_nothing_but_the_standard_library() -> None:
    """-S leaves out all that is installed."""
    command = [sys.executable, "-S", "-m", "benchmarks.gpu_call", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={})
    assert done.returncode == 0 and "--wheels" in done.stdout, done.stderr
