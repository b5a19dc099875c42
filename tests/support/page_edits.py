"""What docs/adding_a_structure.md says, done to a copy of the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding_a_structure.md"


def blocks_of(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def replaced(text: str, hunk: list[str]) -> str:
    """A file's text after one part of a diff, whose context has to be found exactly once."""
    before = "".join(f"{line[1:]}\n" for line in hunk if line[:1] in (" ", "-"))
    after = "".join(f"{line[1:]}\n" for line in hunk if line[:1] in (" ", "+"))
    assert all(line[:1] in (" ", "-", "+") for line in hunk) and before, hunk
    # Lines, not ends of longer ones.
    assert f"\n{text}".count(f"\n{before}") == 1, (text.count(before), before)
    return f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:]


def follow(page: Path, root: Path) -> None:
    """Copy the package to ``root / megatron_lpa`` and write there what a page says."""
    shutil.copytree(
        ROOT / "megatron_lpa", root / "megatron_lpa", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "ds_configs", root / "ds_configs")
    (name,) = re.findall(r"^The new file, `(.*?)`:$", page.read_text(), re.MULTILINE)
    (source,) = blocks_of(page, "python")
    (root / name).write_text(source)
    for diff in blocks_of(page, "diff"):
        first, *lines = diff.splitlines()
        path = root / first.removeprefix("--- ")
        text = path.read_text()
        for hunk in "\n".join(lines).split("\n@@\n"):
            text = replaced(text, hunk.split("\n"))
        path.write_text(text)
