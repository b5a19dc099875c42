"""Going on with an earlier result: what stays, what is measured again, what is refused."""

from __future__ import annotations

import argparse
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite, suite_state, suite_tests
from benchmarks.kernel_timing import setting_of
from benchmarks.machine import write_result
from benchmarks.suite_resume import finished_figures
from megatron_lpa.errors import UserError

PASSED = {"exit_code": 0, "counts": {"passed": 5}, "passed": True, "output": ""}
PARTS = ("gate", "ceilings", "steps", "projections", "tune", "projections-rest", "evaluate-step")


def suite_of(output: Path, *words: str) -> dict[str, Any]:
    """The result of a dry run of some parts; steps in the bare loop alone, without DeepSpeed."""
    parser = argparse.ArgumentParser()
    gpu_suite.add_arguments(parser)
    table = str(output.with_name("shipped.json"))
    gpu_suite.run(parser.parse_args(["--dry-run", "--output", str(output), "--table", table, *words]))
    return json.loads(output.read_text())


def played(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Tests that pass: one entry for each time that they were run. Steps in the bare loop alone."""
    started: list[Any] = []
    monkeypatch.setattr(suite_tests, "run_tests", lambda files, *_: started.append(files) or PASSED)
    works = gpu_suite.works

    def bare(suite: Any, *rest: Any) -> Any:
        steps = ["--models", "transformer", "lpa", "--loops", "bare"]
        return works(suite, *rest) | {"steps": lambda: suite.train_step("train_step", steps)}

    monkeypatch.setattr(gpu_suite, "works", bare)
    return started


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A result that has all of ``PARTS``."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        played(monkeypatch)
        return suite_of(tmp_path_factory.mktemp("whole") / "first.json", "--parts", *PARTS)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How often the tests were run in this test."""
    return played(monkeypatch)


@pytest.fixture
def earlier(whole: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "first.json"
    path.write_text(json.dumps(whole))
    return path


FIGURES = ("tests", "ceilings", "train_step", "kernel", "tune", "evaluate_step")


def test_a_whole_result_is_kept_as_it_is(earlier: Path, gates: list[Any], tmp_path: Path) -> None:
    before = json.loads(earlier.read_text())
    after = suite_of(tmp_path / "second.json", "--parts", *PARTS, "--continue", str(earlier))
    assert {key: after[key] for key in FIGURES} == {key: before[key] for key in FIGURES}
    assert all(state.get("kept") for state in after["parts"].values()) and gates == []
    assert len(after["calls"]) == 2
    shipped = json.loads((tmp_path / "shipped.json").read_text())["cases"]
    assert len(shipped) == len(before["tune"]) and all(line in shipped for line in before["tune"])


def test_only_what_is_missing_or_failed_is_measured(earlier: Path, gates: list[Any]) -> None:
    """The result takes the earlier one's place."""
    before = json.loads(earlier.read_text())
    damaged = copy.deepcopy(before)
    dense, lpa = damaged["train_step"]["contenders"]
    damaged["train_step"]["contenders"][1] = {"contender": lpa["contender"], "error": "stopped after 9 s"}
    damaged["tune"].pop()
    damaged["kernel"][0]["plain"]["joined"] = {"error": "too large"}
    del damaged["kernel"][0]["with_norm_and_rotary"]["separate compiled"]
    damaged["evaluate_step"]["models"][0] = {"preset": "tiny/transformer", "error": "too large"}
    damaged["parts"]["ceilings"] = {"status": "running", "code": []}
    del damaged["ceilings"]
    earlier.write_text(json.dumps(damaged))
    after = suite_of(earlier, "--parts", *PARTS, "--continue", str(earlier))
    assert after["ceilings"]["flops"] > 0
    assert after["train_step"]["contenders"][0] == dense
    assert after["train_step"]["contenders"][1]["step_ms"] and len(after["train_step"]["comparisons"]) == 1
    assert len(after["tune"]) == len(before["tune"]) and after["tune"][:-1] == before["tune"][:-1]
    plain, compiled = after["kernel"][0]["plain"], after["kernel"][0]["with_norm_and_rotary"]
    assert plain["joined"]["forward"]["device_us"] > 0 and "separate compiled" in compiled
    assert plain["separate"] == before["kernel"][0]["plain"]["separate"]
    first, second = after["evaluate_step"]["models"]
    assert first["step_ms"] and second == before["evaluate_step"]["models"][1]
    assert len(after["evaluate_step"]["comparisons"]) == 1
    assert [name for name, state in after["parts"].items() if state.get("kept")] == ["gate"]


def test_other_code_passes_the_gate_again_and_each_part_names_its_code(
    earlier: Path, gates: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads(earlier.read_text())
    old = before["calls"][0]["code"]
    before["train_step"]["contenders"].pop()
    earlier.write_text(json.dumps(before))
    monkeypatch.setattr(suite_state, "code_digest", lambda: "new")
    after = suite_of(tmp_path / "second.json", "--parts", *PARTS, "--continue", str(earlier))
    assert len(gates) == 1
    codes = {name: state["code"] for name, state in after["parts"].items()}
    assert codes == {name: [old] for name in PARTS} | {"gate": [old, "new"], "steps": [old, "new"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, here 1"),
        ({"device": {"type": "cuda", "name": "NVIDIA A100"}}, "GPU NVIDIA A100, here cpu"),
        ({"versions": {"torch": "1.0", "triton": "1.1"}}, r"torch 1.0, here \S+; Triton 1.1, here"),
        ({"dry_run": False}, "dry run False, here True"),
        ({"versions": {}}, r"damaged \(KeyError"),
        ({"benchmark": "kernel"}, "not a result of the GPU suite"),
    ],
)
def test_figures_of_other_circumstances_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, output = tmp_path / "first.json", tmp_path / "second.json"
    suite_of(earlier, "--parts", "ceilings")
    earlier.write_text(json.dumps(json.loads(earlier.read_text()) | change))
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(["--dry-run", "--output", str(output), "--continue", str(earlier)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 78 and not output.exists()
    assert line.startswith(f"error: --continue {earlier}: ") and line.endswith(
        "measure anew, without --continue"
    )
    assert re.search(message, line), line


@pytest.mark.parametrize(("text", "message"), [("{\"benchm", "cannot be read as a result"), ("[1]", "not a result"), (None, "no such file")])  # fmt: skip  # noqa: E501
def test_what_is_no_result_is_refused(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "first.json").write_text(text)
    words = [
        "--dry-run",
        "--output",
        str(tmp_path / "second.json"),
        "--continue",
        str(tmp_path / "first.json"),
    ]
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(words)
    assert stop.value.code == 78 and message in capsys.readouterr().err
    assert not (tmp_path / "second.json").exists()


def test_a_contender_counts_with_all_its_rounds() -> None:
    full, half = {"all_steps_ms": [[1.0], [1.0]]}, {"all_steps_ms": [[1.0]]}
    step = {"rounds": 2, "contenders": [full, half, {**full, "later_error": "ended"}, {"error": "x"}]}
    assert finished_figures({"train_step": step})["train_step"]["contenders"] == [full]


def test_a_part_that_is_cut_short_says_so_and_keeps_its_figures(tmp_path: Path) -> None:
    suite = suite_state.SuiteState(setting_of(True, 1.0), tmp_path / "result.json", 60.0)

    def work() -> None:
        suite.record("figures", [1])
        suite.stop = 0.0

    def interrupted() -> None:
        suite.record("figures", [1, 2])
        raise SystemExit(143)

    suite.part("first", work, 60.0)
    with pytest.raises(SystemExit):
        suite.part("second", interrupted, 60.0)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [state["status"] for state in result["parts"].values()] == ["stopped at the limit", "interrupted"]
    assert result["figures"] == [1, 2] and result["parts"]["first"]["code"] == [suite.code]


def test_a_result_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "result.json"
    write_result(path, {"figure": 1})
    with pytest.raises(TypeError):
        write_result(path, {"figure": 2, "no JSON": object()})
    assert json.loads(path.read_text()) == {"figure": 1}
    assert [found.name for found in path.parent.iterdir()] == ["result.json"]
    write_result(path, {"figure": 3})
    assert json.loads(path.read_text()) == {"figure": 3}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_result(tmp_path / "file" / "result.json", {})
