"""Names inside a run folder are spelled in ``run_folder.py`` and nowhere else, so that they can change in one
place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_lpa import run_folder

ROOT = Path(__file__).parents[2]
OWN = {
    value
    for name, value in vars(run_folder).items()
    if name.isupper()
    and not name.startswith("_")
    and isinstance(value, str)
    and re.fullmatch(r"[\w.]+", value)
}
WORDS = {name for name in OWN if name.lstrip(".").isalpha()}
"""Names that are words or endings as well: names of paths only where they are joined to one."""

OTHERS = {
    ("tools/demo.py", "tokenizer"): "the demonstration's own folder",
    ("fault_injection/refusals.py", "logs"): "the campaign's own folder",
    ("fault_injection/runs.py", "logs"): "the campaign's own folder",
    ("fault_injection/runs.py", ".lock"): "of the campaign's references",
    ("fault_injection/scenario.py", "logs"): "the campaign's own folder",
}


def spelled(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Constants, of f-strings too, with a name of the run folder as a part of a path, and their lines."""
    docstrings = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(body := getattr(node, "body", None), list)
        for statement in body
        if isinstance(statement, ast.Expr)
    }
    joined = {
        id(side)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        for side in ast.walk(node.right)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docstrings:
            continue
        text = node.value
        if " " in text.strip():  # a sentence
            continue
        for part in text.split("/"):
            is_path = id(node) in joined or "/" in text
            if (part in OWN and (part not in WORDS or is_path)) or re.search(
                rf"(^|[^\w])({run_folder.DAMAGED}|{run_folder.PASSED})?{run_folder.STEP}(\W|\d|$)", part
            ):
                yield node.lineno, part


def test_no_other_module_spells_a_name_of_the_run_folder() -> None:
    assert {"metrics.jsonl", "config.yaml", "checkpoints", "passed_over.json", "logs", ".lock"} <= OWN
    found = set()
    for room in ("megatron_lpa", "tools", "benchmarks", "fault_injection"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name != "megatron_lpa/run_folder.py":
                found |= {(name, part) for _, part in spelled(ast.parse(path.read_text()))}
    assert found == set(OTHERS)


def test_the_check_sees_them() -> None:
    for text in (
        'folder / "checkpoints"', 'f"step_{step:08d}"', 'x.glob("step_*")', 'open("run/metrics.jsonl")',
        'name = "config.yaml"', r're.compile(r"\.step_.*")', 'f"{CHECKPOINTS}/damaged_step_00000001"',
    ):  # fmt: skip
        assert list(spelled(ast.parse(text))), text
    for text in ('say("the checkpoints")', 'key = "tokenizer"', 'record["step_ms"]', '"train_step_65k"'):
        assert not list(spelled(ast.parse(text))), text


def test_the_scripts_of_slurm_spell_no_name_of_a_checkpoint() -> None:
    for script in sorted((ROOT / "slurm").glob("*.sh")):
        code = "\n".join(
            line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")
        )
        assert run_folder.STEP not in code.replace("newest_step", ""), script
        assert run_folder.CHECKPOINTS not in code and run_folder.MANIFEST not in code, script
