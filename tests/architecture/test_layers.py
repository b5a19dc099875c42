"""Rules of the tree that import-linter cannot express; pyproject.toml holds the order of the layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_lpa"
MAX_LINES = 400


def sources(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.py"))
    assert files, folder
    return files


def imported_modules(path: Path) -> Iterator[str]:
    """Every module an import statement could load, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(folder: Path, module: str) -> set[Path]:
    return {
        path
        for path in sources(folder)
        if any(name == module or name.startswith(f"{module}.") for name in imported_modules(path))
    }


def attributes(path: Path) -> set[str]:
    """Dotted names that the code uses, as ``torch.distributed.barrier``."""
    nodes = ast.walk(ast.parse(path.read_text(), str(path)))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("module", ["torch.distributed", "torch.nn"])
def test_kernels_know_neither_processes_nor_modules(module: str) -> None:
    assert importers(PACKAGE / "kernels", module) == set()
    for path in sources(PACKAGE / "kernels"):
        assert not any(name.startswith(module) for name in attributes(path)), path


def test_only_the_engine_imports_deepspeed() -> None:
    found = importers(PACKAGE, "deepspeed")
    assert found, "the engine imports deepspeed; if it no longer does, this test looks for the wrong thing"
    assert {path.relative_to(PACKAGE).parts[0] for path in found} == {"engine"}


def test_relative_imports_are_not_used() -> None:
    for path in sources(PACKAGE):
        relative = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert not relative, path


@pytest.mark.parametrize(
    "code",
    [
        "import megatron_lpa as m\nm.load_config, m.IndexedDataset, m.estimate_memory, m.read_metrics, "
        "dir(m)",
        "import pkgutil, importlib, megatron_lpa.data as d\n"
        "[importlib.import_module(f'megatron_lpa.data.{m.name}') for m in pkgutil.iter_modules(d.__path__)]",
        "import runpy, sys\nsys.argv = ['plan.py', '--preset', 'tiny/lpa', '--json']\n"
        "try: runpy.run_path('tools/plan.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code",
        "import sys, megatron_lpa.__main__ as console\nsys.argv = ['megatron-lpa', 'plan', '--preset', "
        "'tiny/lpa']\nassert console.console() == 0",
    ],
    ids=["public names", "data", "tools/plan.py", "megatron-lpa plan"],
)
def test_starts_without_torch(code: str) -> None:
    check = "\nimport sys\nassert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_files_are_short_enough_to_hold_in_the_head() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in sources(PACKAGE)}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_every_package_of_the_tree_is_in_the_layer_contract() -> None:
    contract = (ROOT / "pyproject.toml").read_text().partition("[tool.importlinter]")[2]
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    missing = {name for name in packages if f"megatron_lpa.{name}" not in contract}
    assert missing == set()


def test_a_basename_means_one_thing() -> None:
    names = [path.name for path in sources(PACKAGE) if path.name != "__init__.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []
