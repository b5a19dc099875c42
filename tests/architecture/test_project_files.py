"""The files that other programs read about this project parse, and call what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lpa import __version__

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [p for p in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if p.name != "config.yml"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_what_exists_and_end(path: Path) -> None:
    for job in read(path)["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for command in (step["run"] for step in job["steps"] if "run" in step):
            program, _, rest = command.partition(" ")
            assert (ROOT / program).is_file() or (program == "make" and rest.split()[0] in TARGETS), command


def test_one_workflow_does_what_a_bare_machine_does() -> None:
    jobs = [job for path in WORKFLOWS for job in read(path)["jobs"].values()]
    (job,) = (job for job in jobs if ".ci/run" in [step.get("run") for step in job["steps"]])
    versions = job["strategy"]["matrix"]["python"]
    assert f'requires-python = ">={versions[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert "3.12" in versions


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_what_a_form_needs(path: Path) -> None:
    form = read(path)
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])


def test_hooks_are_the_tools_of_make_check() -> None:
    hooks = read(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    called = re.findall(r"\$\(BIN\)/([\w-]+)", check[1])
    assert {hook["entry"].partition(" ")[0] for hook in hooks} == {f".venv/bin/{name}" for name in called}


def test_the_citation_is_that_of_the_readme_and_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert citation["version"] == __version__
    paper, readme = citation["preferred-citation"], (ROOT / "README.md").read_text()
    bibtex = dict(re.findall(r"^  (\w+) += \{(.*)\}", readme, re.MULTILINE))
    assert [str(paper[key]) for key in ("title", "year", "url")] == [
        bibtex[key] for key in ("title", "year", "url")
    ]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) == bibtex["author"]
    assert f"{paper['start']}--{paper['end']}" == bibtex["pages"]


def test_every_page_is_in_the_site_once() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [
            page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)
        ]

    # The file has one tag, of a Python function, that only MkDocs knows.
    site = yaml.safe_load(re.sub(r"!!python/name:\S+", "", (ROOT / "mkdocs.yml").read_text()))
    assert sorted(pages(site["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
