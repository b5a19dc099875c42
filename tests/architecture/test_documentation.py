"""What the documentation says exists: links, files, commands, options, keys, presets, and the worked
example."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lpa.config import preset_names
from megatron_lpa.config.loading import load_config
from megatron_lpa.config.schema import CONFIG_KEYS, CONFIG_SECTIONS
from megatron_lpa.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FAMILIES = {name.partition("/")[0] for name in preset_names()}
FILE_ENDINGS = {"py", "md", "json", "yaml", "bin", "idx", "safetensors", "model", "jsonl"}

pages = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)


def code_blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def shell_commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page, continued lines joined, here-documents left out."""
    for block in code_blocks(page, "bash", "sh", "console"):
        block = re.sub(r"<<'EOF'\n.*?^EOF$", "", block, flags=re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the command
                del words[0]
            if words:
                yield words


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def options_of(tool: Path) -> set[str]:
    """Options in the source of a tool or its command; faster than asking every tool for --help."""
    command = ROOT / "megatron_lpa" / "commands" / tool.name
    source = (command if command.exists() else tool).read_text()
    return set(re.findall(r'"(--[a-z][a-z0-9-]*)"', source)) | (
        {"--run"} if "take_runs(" in source else set()
    )


def test_there_are_pages() -> None:
    assert {"README.md", "docs/architecture.md", "docs/running.md", "docs/data.md"} <= set(PAGE_IDS)


@pages
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target


@pages
def test_commands_exist_and_take_these_options(page: Path) -> None:
    for words in shell_commands(page):
        if words[0] == "megatron-lpa" and words[1] != "pretrain":  # what the tool in a checkout takes
            words = ["python", f"tools/{words[1].replace('-', '_')}.py", *words[2:]]
        program = words[0]
        if program == "python" and words[1].endswith(".py"):
            tool = ROOT / words[1]
            assert tool.is_file(), words[1]
            own = options_of(tool)
            if tool.name == "benchmark.py":  # every sub-command is a module
                module = re.search(rf'"{words[2]}": (\w+)', tool.read_text())
                assert module, words[2]
                own = options_of(ROOT / "benchmarks" / f"{module[1]}.py")
            own_words = [w.partition("=")[0] for w in words[2:] if w.startswith("--")]
            others = [w for w in own_words if w not in own]
            if tool.name in ("plan.py", "health_check.py"):  # they take every option of a run too
                others = [w for w in others if w not in ("--preset", "--config") and w[2:] not in CONFIG_KEYS]
            assert not others, (words[1], others)
        elif call := {"megatron_lpa.pretrain", "pretrain"} & {*words}:
            arguments = words[words.index(*call) + 1 :]
            if "--help" not in arguments:
                load_config(arguments)  # names, types and presets; a UserError fails the test
        elif program == "sbatch" or program.startswith("slurm/"):
            script = next(number for number, word in enumerate(words) if word.startswith("slurm/"))
            source = (ROOT / words[script]).read_text()
            if "train_on_slurm" in source:
                load_config(words[script + 1 :])
                continue
            assert "tools/preprocess_data.py" in source  # which takes the rest
            own = options_of(ROOT / "tools" / "preprocess_data.py")
            assert [w for w in words[script + 1 :] if w.startswith("--") and w not in own] == []
        else:
            assert program in ("make", ".", "pip", "python", "megatron-lpa"), words


@pages
def test_commands_in_running_text_name_existing_files_and_targets(page: Path) -> None:
    text = page.read_text()
    for tool in re.findall(r"\btools/\w+\.py\b", text):
        assert (ROOT / tool).is_file(), tool
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target
    for name in re.findall(
        r"\b(?:megatron_lpa|tests|ds_configs|docs)/[\w/.]*\w\.(?:py|yaml|json|md)\b", text
    ):
        # The page about adding a structure names the file that its reader will write.
        assert (ROOT / name).is_file() or name == "megatron_lpa/structures/blockdense.py", name
    for name in re.findall(
        r"`((?:config|parallel|data|ops|layers|structures|model|engine|train|evaluate)/[\w/]*\.py)`", text
    ):
        assert (ROOT / "megatron_lpa" / name).is_file(), name


@pages
def test_lines_of_prose_are_short(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > 110 and not line.startswith(("|", "!"))] == []


@pages
def test_keys_exist(page: Path) -> None:
    text = re.sub(r"^```(?:python|diff)\n.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    sections = "model|parallel|data|optim|train|logging"
    for key in re.findall(rf"(?<![\w./])(?:--)?((?:{sections})\.[a-z_]\w*(?:\.\w+)*)", text):
        if key.rpartition(".")[2] in FILE_ENDINGS or key.startswith(
            "model.hiden_"
        ):  # a spelling mistake on show
            continue
        assert key in CONFIG_KEYS or key in CONFIG_SECTIONS, key


@pages
def test_presets_exist(page: Path) -> None:
    known = set(preset_names())
    for family, variant in re.findall(rf"\b({'|'.join(FAMILIES)})/([a-z]\w*)", page.read_text()):
        assert f"{family}/{variant}" in known, f"{family}/{variant}"


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(UserError, match="unknown option"):
        load_config(["--preset", "tiny/lpa", "--model.hiden_size", "8"])


@pages
def test_yaml_examples_are_configurations(page: Path, tmp_path: Path) -> None:
    for block in code_blocks(page, "yaml"):
        path = tmp_path / "example.yaml"
        path.write_text(block)
        load_config(["--config", str(path)])


@pages
def test_python_examples_compile(page: Path) -> None:
    for block in code_blocks(page, "python"):
        if not block.startswith(" "):  # indented ones are lines to put into a file
            compile(block, str(page), "exec")


def test_every_preset_is_in_the_table_of_models() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    assert [name for name in preset_names() if f"| `{name}` |" not in text] == []


def test_the_table_of_models_has_the_counts_of_the_presets() -> None:
    from megatron_lpa.planning.parameters import count_parameters

    text = (ROOT / "docs" / "models.md").read_text()
    counts = dict(re.findall(r"^\| `(\w+/\w+)` \|[^|]*\| ([\d,]+) \|", text, re.MULTILINE))
    for name in preset_names():
        total = count_parameters(load_config(["--preset", name]).model).total
        assert counts[name] == f"{total:,}", name


def test_the_table_of_rooms_is_the_contract_of_layers() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## The tree")[2].partition("Beside the package")[0]
    names = [
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)", row)
    ]
    project = (ROOT / "pyproject.toml").read_text().partition("[tool.importlinter]")[2]
    layers = project.partition("layers = [")[2].partition("\n]")[0].splitlines()
    level = {name: n for n, line in enumerate(layers) for name in re.findall(r"megatron_lpa\.(\w+)", line)}
    assert sorted(names) == sorted(level)
    assert [level[name] for name in names] == sorted(level.values())
    contracts = set(re.findall(r"^name = \"(.*)\"", project, re.MULTILINE))
    assert set(re.findall(r"\*([A-Z][\w :,]+)\*", text)) == contracts


def test_messages_that_the_page_on_running_explains_are_said() -> None:
    said = "".join(path.read_text() for path in (ROOT / "megatron_lpa").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", said)  # a message over several lines
    table = (ROOT / "docs" / "running.md").read_text().partition("## Messages and what they mean")[2]
    parts = [
        part for message in re.findall(r"^\| `(.*?)`", table, re.MULTILINE) for part in message.split("...")
    ]
    assert len(parts) > 10
    assert [part for part in parts if part.strip(" ,`") not in said] == []


@pytest.mark.parametrize("end", ["Input", "Output"])
def test_the_worked_structure_equals_the_whole_matrix(end: str, tmp_path: Path) -> None:
    import torch

    from megatron_lpa.config import KernelConfig
    from megatron_lpa.layers.sublayers import BoundOperations
    from megatron_lpa.parallel.groups import ParallelGroups

    page = ROOT / "docs" / "adding_a_structure.md"
    (source,) = (code for code in code_blocks(page, "python") if "class BlockDenseInput" in code)
    path = tmp_path / "blockdense.py"
    path.write_text(source)
    settings = SimpleNamespace(rank=24, blocks=4, bias="default")
    structure = runpy.run_path(str(path))[f"BlockDense{end}"](settings, 48, 96, True, 1, "latent")
    ops = BoundOperations(KernelConfig(), ParallelGroups.single())
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    p = {name: draw(*spec.shape) for name, spec in structure.specs().items()}
    x = draw(5, 48)
    whole = p["w_b"] @ torch.block_diag(*p["a"])
    if end == "Input":
        (latent,) = structure.before([(structure, p)], x, ops)
        z = structure.after(latent.unsqueeze(-2), p, ops)
    else:
        z = structure.apply(x, p, ops)
    torch.testing.assert_close(z, x @ whole.T + p["bias"])


def test_every_dependency_is_explained_and_pinned() -> None:
    project = (ROOT / "pyproject.toml").read_text().partition("[project]")[2].partition("[tool.")[0]
    names = {n.lower() for n in re.findall(r'"([A-Za-z][\w-]*)(?:[=<>]=?[^"]*)?",?', project)}
    names -= {"megatron_lpa", "readme", "license", "apache-2"}
    assert {"torch", "deepspeed", "pytest", "types-pyyaml"} <= names
    explained = (ROOT / "docs" / "dependencies.md").read_text().lower()
    pinned = (ROOT / "constraints.txt").read_text().lower()
    assert [n for n in names if not re.search(rf"\b{re.escape(n)}\b", explained)] == []
    assert [n for n in names if not re.search(rf"^{re.escape(n)}==", pinned, re.MULTILINE)] == []
