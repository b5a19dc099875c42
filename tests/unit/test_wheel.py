"""What is installed from a wheel works without the repository: the console command, from text to a trained
model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "tests" / "integration" / "small.yaml"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
OURS = [str(ROOT / name) for name in ("megatron_lpa", "ds_configs", "tools", "tests", "benchmarks")]
GUARD = f"""
import os, sys

def guard(event, arguments):
    if event == "open" and str(arguments[0]).startswith({tuple(OURS)!r}):
        os.write(2, f"{{arguments[0]}} is of the repository".encode())
        os._exit(99)

sys.addaudithook(guard)
"""
"""Ends any process of the environment that opens a file of the repository, an imported one too."""

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
    """Runs a program of a new environment with the wheel, in an empty folder: ``run("python", ...)``.

    What the package depends on is that of this environment, which an installed file of paths adds: it is
    large, and whatever is installed here in place (an editable installation) does not count there.
    """
    environment, cwd = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    programs = environment / "bin"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(programs / "python"), "--disable-pip-version-check",
        "install",
         "--quiet", "--no-index", "--no-deps", str(wheel)],
        check=True, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "guard_the_repository.py").write_text(GUARD)
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(["import guard_the_repository", *others]))
    dropped = ("RANK", "WORLD_SIZE", "PYTHONPATH", "PYTHONHOME")
    variables = {name: value for name, value in os.environ.items() if name not in dropped} | {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip

    def run(program: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(programs / program), *map(str, arguments)], cwd=cwd, env=variables, capture_output=True, text=True  # noqa: E501
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    shown = run("python", "-c", "import megatron_lpa; print(megatron_lpa.__file__)").stdout
    assert Path(shown.strip()).is_relative_to(environment)
    run("python", "-c", f"open({str(ROOT / 'tools' / 'plan.py')!r})", code=99)
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
    knobs, presets = json.loads(run("python", "-c", code, *names).stdout)
    assert knobs == {name: json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()) for name in names}
    assert "tiny/lpa" in presets


def test_from_text_to_a_trained_run_that_speaks(run: Run, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text[:2000]}) + "\n" for _, text in sorted(topics.items())[:20]]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    (tmp_path / "small.yaml").write_text(SMALL.read_text())
    text, tokenizer, data = tmp_path / "text.jsonl", tmp_path / "tokenizer", tmp_path / "data"
    done = run("megatron-lpa", "train-tokenizer", "--input", text, "--vocab-size", 300, "--output", tokenizer)
    assert done.stdout == f"{tokenizer}: 300 tokens\n"
    done = run(
        *("megatron-lpa", "preprocess_data", "--input", text, "--tokenizer", tokenizer, "--append-eod"),
        *("--output-prefix", data, "--workers", 1),
    )
    assert done.stdout.startswith(f"{data}_text_document: 20 documents, ")
    done = run(
        *("megatron-lpa", "pretrain", "--config", tmp_path / "small.yaml", "--model.vocab_size", 300),
        *("--data.prefix", f"{data}_text_document", "--data.split", "1,0,0", "--data.tokenizer", tokenizer),
        *("--train.deepspeed_config", "zero3", "--train.steps", 3, "--logging.run_dir", tmp_path),
        *("--logging.name", "wheel"),
    )
    assert "step 3/3 loss" in done.stdout
    assert (tmp_path / "wheel" / "checkpoints" / "step_00000003").is_dir()
    found = run(
        *(
            "megatron-lpa",
            "evaluate",
            "--run",
            tmp_path / "wheel",
            "--text",
            text,
            "--max-tokens",
            64,
            "--json",
        )
    )
    assert json.loads(found.stdout)["tokens"] == 64 and 4 < json.loads(found.stdout)["loss"] < 7
    speech = run(
        *("megatron-lpa", "generate", "--run", tmp_path / "wheel", "--prompt", "The", "--max-new-tokens", 4)
    )
    assert speech.stdout.startswith("The") and len(speech.stdout) > 4
