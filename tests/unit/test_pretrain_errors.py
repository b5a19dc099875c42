"""Which processes tell of an error, and with what: launchers end all when the first has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lpa import pretrain
from megatron_lpa.errors import RankError, UserError


@pytest.mark.parametrize(
    ("rank", "local_rank", "expected"),
    [
        ("0", "0", "error: lr is bad\n"),
        ("1", "1", "error: rank 1 (h): lr is bad\n"),
        ("8", "0", "error: rank 8 (h): lr is bad\n"),
    ],
)
def test_what_one_process_finds_wrong_has_its_rank_and_host(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    local_rank: str,
    expected: str,
) -> None:
    """Also from the first process of another machine. Rank 0's own is as a rule what all would say."""
    monkeypatch.setattr(pretrain, "ALONE_S", 0.0)
    monkeypatch.setattr(pretrain.socket, "gethostname", lambda: "h")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    pretrain._tell(UserError("lr is bad"))
    assert capsys.readouterr().err.startswith(expected)
    pretrain._tell(RankError("rank 7 has its own words"))
    assert capsys.readouterr().err.startswith("error: rank 7 has its own words\n")


def test_what_all_know_is_told_once_per_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "AFTER_OTHERS_S", 0.0)
    error = UserError("all know")
    error.known_to_all = True
    for rank, local_rank, expected in (
        ("0", "0", "error: all know"),
        ("9", "1", ""),
        ("8", "0", "error: all know"),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        pretrain._tell(error)
        assert capsys.readouterr().err.partition("\n")[0] == expected


def test_a_wrong_knob_of_zero_ends_a_start_before_it_makes_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 1, "overlap_com": true}}')
    options = ["--preset", "tiny/lpa", "--data.prefix", "nowhere", "--logging.name", "x"]
    assert pretrain.main([*options, "--train.deepspeed_config", "own.json"]) == 78
    error, *rest = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert (
        error == "error: own.json: unknown key 'zero_optimization.overlap_com'; did you mean 'overlap_comm'?"
    )
    assert len(rest) == 1 and rest[0].startswith("exit code 78: ")
    assert [path.name for path in tmp_path.iterdir()] == ["own.json"]


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_number_of_a_launcher_without_end_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv(name, "9" * 5000)
    assert pretrain.main(["--preset", "tiny/lpa", "--data.prefix", "nowhere", "--logging.name", "x"]) == 78
    said = capsys.readouterr().err
    assert f"{name} is '999" in said and "Traceback" not in said and len(said) < 2000


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "two", "-1"])
def test_a_launcher_s_variable_that_is_no_number_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    """An empty one is read by DeepSpeed too, which ends in a traceback of its own."""
    monkeypatch.setattr(pretrain, "ALONE_S", 0.0)
    monkeypatch.setenv(name, value)
    assert pretrain.main(["--preset", "tiny/lpa", "--data.prefix", "nowhere", "--logging.name", "x"]) == 78
    said = capsys.readouterr().err
    assert f"{name} is {'empty' if not value else repr(value)}" in said or f"{name}={value}" in said
    assert "Traceback" not in said and said.count("\n") == 2
