"""What is installed from a wheel trains without the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.token_datasets import random_documents, write_dataset

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "tests" / "integration" / "small.yaml"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"

Run = Callable[..., subprocess.CompletedProcess[str]]


def tracked(*below: str) -> list[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *below]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")[
        :-1
    ]


def build(source: Path, target: Path, kind: str) -> Path:
    """As ``pip wheel --no-build-isolation`` does, which needs no network."""
    target.mkdir()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD.format(kind=kind), str(target)],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a source archive, as for an index of packages; building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in tracked("megatron_lpa", "ds_configs", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    archive = build(source, folder / "archive", "sdist")
    unpacked = folder / "unpacked"
    subprocess.run(["tar", "xzf", str(archive), "--one-top-level=" + str(unpacked)], check=True)
    (inner,) = unpacked.iterdir()
    return build(inner, folder / "built", "wheel")


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python in an empty folder, with the unpacked wheel before everything else that is installed."""
    installed, cwd = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done

    shown = run("-c", "import megatron_lpa; print(megatron_lpa.__file__)").stdout
    assert Path(shown.strip()).is_relative_to(installed)
    return run


def test_a_wheel_holds_every_file_of_the_package_and_of_ds_configs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        held = {name: file.read(name) for name in file.namelist() if ".dist-info/" not in name}
    expected = {name: (ROOT / name).read_bytes() for name in tracked("megatron_lpa")}
    expected |= {f"megatron_lpa/{name}": (ROOT / name).read_bytes() for name in tracked("ds_configs")}
    assert held == expected


def test_names_of_zero_configurations_and_presets_are_found_away_from_the_repository(run: Run) -> None:
    code = (
        "import json, sys\n"
        "from megatron_lpa.config import preset_names\n"
        "from megatron_lpa.engine.ds_config import read_zero_knobs\n"
        "knobs = {name: read_zero_knobs(name, 'fp32') for name in sys.argv[1:]}\n"
        "print(json.dumps([knobs, preset_names()]))"
    )
    names = [Path(name).stem for name in tracked("ds_configs")]
    assert {"zero0", "zero1", "zero2", "zero3"} <= set(names)
    knobs, presets = json.loads(run("-c", code, *names).stdout)
    assert knobs == {name: json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()) for name in names}
    assert "tiny/lpa" in presets


def test_a_run_trains_from_a_wheel(run: Run, tmp_path: Path) -> None:
    documents = [[token % 97 for token in document] for document in random_documents(0, 20)]
    write_dataset(tmp_path / "data", documents, manifest=False)
    done = run(
        *("-m", "megatron_lpa.pretrain", "--config", str(SMALL), "--data.prefix", str(tmp_path / "data")),
        *("--train.deepspeed_config", "zero3", "--train.steps", "1", "--logging.run_dir", str(tmp_path)),
        *("--data.split", "1,0,0", "--logging.name", "wheel"),
    )
    assert "step 1/1 loss" in done.stdout
    assert (tmp_path / "wheel" / "checkpoints" / "step_00000001").is_dir()
