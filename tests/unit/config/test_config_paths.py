"""``~`` and variables in paths: filled in once, where the configuration is read, and recorded as what they
meant."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest
import yaml

from megatron_lpa.config import RunConfig, load_config, save_config
from megatron_lpa.config.paths import PATH_KEYS
from megatron_lpa.errors import UserError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch/a b")
    monkeypatch.setenv("DOLLAR", "/odd/$HOME")
    monkeypatch.setenv("AT_HOME", "~/corpora")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("STRANGE", "/a\nb")
    monkeypatch.delenv("NOWHERE", raising=False)


def leaf(config: RunConfig, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


TEXTS = {
    "~": "/home/ada",
    "~/data/c": "/home/ada/data/c",
    "$SCRATCH/c": "/scratch/a b/c",
    "${SCRATCH}_old/c": "/scratch/a b_old/c",
    "data/$SCRATCH$SCRATCH": "data//scratch/a b/scratch/a b",
    # What a variable holds is not looked through for variables; it may begin with a home folder.
    "$DOLLAR/c": "/odd/$HOME/c",
    "$AT_HOME/c": "/home/ada/corpora/c",
    "a$$HOME/c$$": "a$HOME/c$",
    "./~/c": "./~/c",
    "a/~/c~": "a/~/c~",
}


@pytest.mark.parametrize("key", sorted(PATH_KEYS - {"data.blend"}))
@pytest.mark.parametrize("text", TEXTS)
def test_paths_are_expanded_from_both_sources_and_recorded_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, text: str
) -> None:
    section, _, name = key.partition(".")
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({section: {name: text}}))
    if text == "~" and key not in ("logging.run_dir", "train.deepspeed_config"):
        return  # YAML's null
    for argv in ([f"--{key}={text}"], ["--config", str(mine)]):
        config = load_config(argv)
        assert leaf(config, key) == TEXTS[text]
    save_config(config, tmp_path / "config.yaml")
    with monkeypatch.context() as later:  # another user continues the run
        for variable in ("SCRATCH", "DOLLAR", "AT_HOME"):
            later.delenv(variable)
        later.setenv("HOME", "/home/bob")
        assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_every_key_that_its_documentation_calls_a_path_is_expanded() -> None:
    """A new key of the configuration that names files has to come into the list, or be one of these."""
    from megatron_lpa.config.schema import CONFIG_KEYS

    texts = {name for name, key in CONFIG_KEYS.items() if key.base_type in (str, dict) and not key.choices}
    assert texts - PATH_KEYS == {"data.split", "logging.name", "logging.wandb_project"}
    assert texts >= PATH_KEYS


def test_names_of_a_blend_are_paths(tmp_path: Path) -> None:
    config = load_config(["--data.blend", '{"~/a": 1, "$SCRATCH/b": 2, "c$$": 3}'])
    assert config.data.blend == {"/home/ada/a": 1.0, "/scratch/a b/b": 2.0, "c$": 3.0}
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    with pytest.raises(UserError, match=r"data\.blend \(command line\) names /home/ada/a twice"):
        load_config(["--data.blend", '{"~/a": 1, "/home/ada/a": 2}'])


def test_the_home_of_another_user() -> None:
    user = pwd.getpwall()[0]
    config = load_config([f"--data.prefix=~{user.pw_name}/c", f"--logging.run_dir=~{user.pw_name}"])
    assert config.data.prefix == f"{user.pw_dir.rstrip('/')}/c"
    assert config.logging.run_dir == user.pw_dir


def test_the_path_of_a_configuration_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("train: {seed: 5}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CONFIGS", str(tmp_path))
    for path in ("~/mine.yaml", "$CONFIGS/mine.yaml"):
        assert load_config([f"--config={path}"]).train.seed == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$NOWHERE/c", ["data.prefix (command line) is '$NOWHERE/c'", "NOWHERE is not set", "$$"]),
        ("a/${NOWHERE}", ["NOWHERE is not set"]),
        ("$EMPTY/c", ["EMPTY is empty"]),
        ("$SCRATHC/c", ["SCRATHC is not set", "did you mean $SCRATCH?"]),
        ("${SCRATCH/c", ["'$' begins no name", "$$"]),
        ("${SCRATCH:-/tmp}", ["'$' begins no name"]),
        ("$(pwd)/c", ["'$' begins no name"]),
        ("a$", ["'$' begins no name"]),
        ("$1", ["'$' begins no name"]),
        ("~no_such_user/c", ["there is no user no_such_user", "./~no_such_user/c"]),
        ("$STRANGE", ["'\\n' has no place in it"]),
    ],
)
def test_what_cannot_be_expanded_is_explained(text: str, expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(["--data.prefix", text])
    assert all(part in str(error.value) for part in expected), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("home", ["", "ada"])
def test_a_home_that_is_no_path(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("HOME", home)
    with pytest.raises(UserError, match=r"logging\.run_dir .* is '~/runs' but the home folder"):
        load_config(["--logging.run_dir=~/runs"])


def test_text_that_is_no_path_keeps_its_dollars(tmp_path: Path) -> None:
    config = load_config(["--logging.name", "a$b", "--logging.wandb_project", "~x"])
    assert (config.logging.name, config.logging.wandb_project) == ("a$b", "~x")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
