"""Where values come from, which source wins, and what a user is told when something is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lpa.config import RunConfig, load_config, preset_names, save_config
from megatron_lpa.errors import UserError


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def message(argv: list[str]) -> str:
    with pytest.raises(UserError) as error:
        load_config(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_arguments_the_defaults_come_back_with_a_name() -> None:
    config = load_config([])
    assert config.logging.name == "run"
    assert dataclasses.replace(config, logging=RunConfig().logging) == RunConfig()


def test_precedence_is_defaults_base_variant_file_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 0.5, eps: 1e-7}\nmodel: {num_layers: 3}\n")
    config = load_config(["--preset", "3b/lpa", "--config", path, "--model.num_layers", "2"])
    assert config.model.num_layers == 2  # command line over file
    assert (config.optim.lr, config.optim.eps) == (0.5, 1e-7)  # file over variant and base
    assert load_config(["--preset", "3b/lpa"]).optim.lr == 6e-4  # variant over base
    assert config.model.hidden_size == 4096  # base over default
    assert config.optim.wsd_decay_fraction == 0.1  # default
    # A source changes the keys it names, not the whole section.
    assert config.model.projections.q.rank == 512


def test_a_config_of_an_earlier_version_has_todays_values(tmp_path: Path) -> None:
    path = write(tmp_path, "parallel: {lowdim_layout: rank}\nkernels: {lowdim: merged}\n")
    config = load_config(["--config", path])
    assert (config.parallel.lowdim_layout, config.kernels.lowdim) == ("column_row", "eager")


@pytest.mark.parametrize("form", [["--model.projections.q.rank", "128"], ["--model.projections.q.rank=128"]])
def test_overrides_reach_nested_keys_in_both_forms(form: list[str]) -> None:
    projections = load_config(["--preset=s1_small/lpa", *form]).model.projections
    assert (projections.q.rank, projections.k.rank) == (128, 256)


def test_command_line_values_are_typed() -> None:
    config = load_config(
        [
            *("--model.num_kv_heads", "null", "--model.linear_bias", "false", "--optim.lr", "8e-4"),
            *("--train.tokens", "51e9", "--data.prefix", "123", "--model.dropout", "0", "--train.seed", "-1"),
            *("--logging.wandb", "off"),
        ]
    )
    assert config.model.num_kv_heads is None and config.model.linear_bias is False
    assert config.optim.lr == 0.0008 and isinstance(config.optim.lr, float)
    assert config.train.tokens == 51_000_000_000 and isinstance(config.train.tokens, int)
    assert config.data.prefix == "123" and config.model.dropout == 0.0 and config.train.seed == -1
    assert config.logging.wandb == "off"


def test_yaml_reads_numbers_and_words_as_people_write_them(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "optim: {lr: 8e-4, eps: 1E-5}\ntrain: {tokens: 51e9, seed: 010}\n"
        "logging: {wandb: off, progress_bar: on, name: 2024-01-31}\nmodel:\ndata: {prefix: a:b}\n",
    )
    config = load_config(["--config", path])
    assert (config.optim.lr, config.optim.eps) == (0.0008, 1e-5)
    assert (config.train.tokens, config.train.seed) == (51_000_000_000, 10)
    assert (config.logging.wandb, config.logging.progress_bar) == ("off", "on")
    assert (config.logging.name, config.data.prefix) == ("2024-01-31", "a:b")


def test_the_strongest_source_decides_the_length_of_a_run(tmp_path: Path) -> None:
    assert load_config(["--preset", "s1_small/lpa"]).train.epochs == 10
    train = load_config(["--preset", "s1_small/lpa", "--train.steps", "7"]).train
    assert (train.steps, train.tokens, train.epochs) == (7, None, None)
    train = load_config(["--preset", "s1_small/lpa", "--train.steps", "null"]).train
    assert train.epochs == 10
    # Two lengths in one source are a contradiction that validation reports, not a choice.
    train = load_config(["--train.steps", "7", "--train.tokens", "9"]).train
    assert (train.steps, train.tokens) == (7, 9)


def test_launchers_may_append_a_local_rank() -> None:
    plain = load_config(["--preset", "tiny/lpa"])
    assert load_config(["--local_rank=3", "--preset", "tiny/lpa"]) == plain
    assert load_config(["--preset", "tiny/lpa", "--local-rank", "0"]) == plain


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_config([])
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for program in ("PYTEST", "__MAIN__", "PRETRAIN"):
        monkeypatch.setenv(f"{program}_MODEL__HIDDEN_SIZE", "7")
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    assert load_config([]) == plain


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model.hiden_size", "3"], ["--model.hiden_size", "--model.hidden_size"]),
        (["--hidden_size", "3"], ["--hidden_size", "--model.hidden_size"]),
        (["--lr=3"], ["--lr", "--optim.lr"]),
        (["--preest", "tiny/lpa"], ["--preest", "--preset"]),
        (["--deepspeed"], ["unknown option --deepspeed"]),
        (["--model.projections.q", "3"], ["is a section", "--model.projections.q.rank"]),
        (["--model.hidden_size"], ["--model.hidden_size needs a value"]),
        (["--preset", "--train.steps", "3"], ["--preset needs a value"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--train.steps", "2.5"], ["train.steps", "'2.5'", "command line", "whole number"]),
        (["--model.hidden_size", "wide"], ["model.hidden_size", "'wide'", "whole number"]),
        (["--model.hidden_size", "null"], ["model.hidden_size", "null", "whole number"]),
        (["--model.linear_bias", "7"], ["model.linear_bias", "'7'", "true or false"]),
        (["--model.norm", "batchnorm"], ["model.norm", "'batchnorm'", "layernorm, rmsnorm"]),
        (["--optim.lr", "nan"], ["optim.lr", "'nan'", "a number"]),
        (["--model.dropout", ".inf"], ["model.dropout", "a number"]),
        (["--data.blend", "corpus"], ["data.blend", "'corpus'", '{"data/a": 0.7']),
        (["--data.blend", '{"a": "much"}'], ["data.blend", "much", "names and numbers"]),
        (["--data.blend.a", "1"], ["unknown option --data.blend.a"]),
        (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
    ],
)
def test_a_bad_command_line_is_explained(argv: list[str], expected: list[str]) -> None:
    text = message(argv)
    assert all(part in text for part in expected), text


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("model: {hiden_size: 3}", ["model.hiden_size", "mine.yaml", "model.hidden_size"]),
        ("optimizer: {lr: 1}", ["optimizer", "mine.yaml"]),
        ("model: {projections: {query: {rank: 3}}}", ["model.projections.query", "mine.yaml"]),
        ("model: 5", ["model", "section", "mine.yaml"]),
        ("model: {hidden_size: [1]}", ["model.hidden_size", "[1]", "mine.yaml", "whole number"]),
        ("model: {hidden_size: null}", ["model.hidden_size is null", "mine.yaml"]),
        ("model: {hidden_size: true}", ["model.hidden_size", "True", "whole number"]),
        ("data: {prefix: 12}", ["data.prefix", "12", "put it in quotes"]),
        ("optim: {lr: .nan}", ["optim.lr", "mine.yaml", "a number"]),
        ("optim: {lr: 1, lr: 2}", ["mine.yaml, line 1", "'lr' appears twice"]),
        ("optim:\n  lr: [", ["mine.yaml, line", "not valid YAML"]),
        ("- 1", ["mine.yaml", "sections"]),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, yaml: str, expected: list[str]) -> None:
    text = message(["--config", write(tmp_path, yaml)])
    assert all(part in text for part in expected), text


@pytest.mark.parametrize(
    ("name", "guess"),
    [("s1_smal/lpa", "s1_small/lpa"), ("3b/lap", "3b/lpa"), ("tiny", "tiny/transformer"), ("lpa", "3b/lpa")],
)
def test_an_unknown_preset_lists_the_nearest_and_all(name: str, guess: str) -> None:
    text = message(["--preset", name])
    before, _, available = text.partition("available: ")
    assert name in before and guess in before.partition("did you mean")[2]
    assert available.split(", ") == preset_names()


@pytest.mark.parametrize("name", preset_names())
def test_a_saved_config_reloads_to_an_equal_object(tmp_path: Path, name: str) -> None:
    config = load_config(["--preset", name])
    assert config.logging.name == name.replace("/", "-")
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(["--config", str(tmp_path / "run" / "config.yaml")]) == config


def test_a_blend_is_read_from_the_command_line_and_from_yaml_and_saved(tmp_path: Path) -> None:
    expected = {"data/pile.v2_text_document": 0.3, "b": 7.0, "12": 1e-3}
    given = '{"data/pile.v2_text_document": 0.3, "b": 7, "12": 1e-3}'
    path = write(tmp_path, f"data: {{prefix: null, blend: {given}}}")
    for argv in (["--data.blend", given], [f"--data.blend={given}"], ["--config", path]):
        config = load_config(argv)
        assert config.data.blend == expected
        assert all(isinstance(weight, float) for weight in config.data.blend.values())
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(["--config", str(tmp_path / "saved.yaml")]) == config
    # A later source replaces the blend; it does not mix with it.
    assert load_config(["--config", path, "--data.blend", "{c: 1}"]).data.blend == {"c": 1.0}
    assert load_config(["--config", path, "--data.blend", "null"]).data.blend is None


@pytest.mark.parametrize("text", ["8e-4", "off", "123", "null", "~", "a: b", "<<", "été # 1", "1:30", "1_0"])
def test_text_that_looks_like_something_else_survives_saving(tmp_path: Path, text: str) -> None:
    config = RunConfig()
    config = dataclasses.replace(
        config, logging=dataclasses.replace(config.logging, wandb_project=text, name="n")
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_saving_replaces_the_whole_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    save_config(load_config([]), path)
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_config(load_config(["--preset", "tiny/lpa"]), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_print_config_prints_yaml_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--preset", "s2_small/lpa", "--optim.lr=1e-4"]
    with pytest.raises(SystemExit) as end:
        load_config([*argv, "--print-config"])
    assert end.value.code == 0
    assert load_config(["--config", write(tmp_path, capsys.readouterr().out)]) == load_config(argv)


def test_help_documents_keys_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_config(["--preset", "no/such", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--model.projections.down.rank INT" in text
    assert "--train.precision {fp32,bf16,bf16_mixed}" in text
    assert "optimizer steps of linear warm-up from 0. (default: 1000)" in text
    assert all(name in text for name in preset_names())


def test_configuration_does_not_need_torch() -> None:
    code = (
        "import sys; from megatron_lpa.config import load_config, validate_config;"
        "validate_config(load_config(['--preset', '3b/lpa']), 16, need_data=False);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
