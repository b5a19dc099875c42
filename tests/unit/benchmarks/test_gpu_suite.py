"""What the GPU suite does when tests fail, do not end, or packages are missing."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite, suite_parts, suite_tests, train_step
from benchmarks.commands import ROOT
from benchmarks.kernel_timing import Setting
from benchmarks.step_config import Contender
from benchmarks.suite_parts import Suite

PASSED = {"exit_code": 0, "counts": {"passed": 5}, "passed": True, "output": ""}
FAILED = {"exit_code": 1, "counts": {"passed": 4, "failed": 1}, "passed": False, "output": ""}
UNFINISHED = {"exit_code": None, "counts": {"passed": 4}, "passed": False, "output": ""}


def arguments_of(module: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


def ran(tmp_path: Path, *parts: str) -> tuple[dict[str, Any], str | int | None]:
    """The result of a dry run of some parts, and what it exited with."""
    output, table = tmp_path / "suite.json", tmp_path / "shipped.json"
    words = ["--dry-run", "--parts", *parts, "--output", str(output), "--table", str(table)]
    code = None
    try:
        gpu_suite.run(arguments_of(gpu_suite, *words))
    except SystemExit as stop:
        code = stop.code
    return json.loads(output.read_text()), code


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (FAILED, "failed"),
        (UNFINISHED, "stopped at the limit"),
        ({**PASSED, "counts": {"skipped": 5}, "passed": False}, "failed"),
    ],
)
def test_without_passed_tests_no_table_is_shipped_and_the_rest_goes_on(
    found: dict[str, Any], status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_tests, "run_tests", lambda *_: found)
    result, code = ran(tmp_path, "gate", "tune")
    assert code == ("failed: gate" if status == "failed" else None)
    assert {name: part["status"] for name, part in result["parts"].items()} == {
        "gate": status,
        "tune": "done",
    }
    assert result["tests"]["gate"] == found
    assert not (tmp_path / "shipped.json").exists()
    assert len(json.loads((tmp_path / "suite.table.json").read_text())["cases"]) == len(result["tune"]) > 0
    assert result["table"].endswith("suite.table.json")


def test_a_table_is_shipped_after_passed_tests_and_where_they_were_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_tests, "run_tests", lambda *_: PASSED)
    for parts in (("gate", "tune"), ("tune",)):
        result, code = ran(tmp_path, *parts)
        assert code is None and result["table"].endswith("shipped.json")
        shipped = json.loads((tmp_path / "shipped.json").read_text())
        # And beside the result, which comes back from a machine that the checkout does not.
        assert json.loads((tmp_path / "suite.table.json").read_text()) == shipped
        (tmp_path / "shipped.json").unlink()


def test_tests_that_failed_in_an_earlier_call_are_not_vouched_for_by_leaving_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_tests, "run_tests", lambda *_: FAILED)
    ran(tmp_path, "gate")
    words = ["--dry-run", "--parts", "tune", "--output", str(tmp_path / "suite.json"), "--continue", str(tmp_path / "suite.json")]  # fmt: skip  # noqa: E501
    with pytest.raises(SystemExit, match="failed: gate"):
        gpu_suite.run(arguments_of(gpu_suite, *words, "--table", str(tmp_path / "shipped.json")))
    assert (tmp_path / "suite.table.json").exists() and not (tmp_path / "shipped.json").exists()


@pytest.mark.parametrize(
    ("record", "status"),
    [
        ({"error": "RuntimeError: wrong"}, "failed"),
        ({"error": "stopped after 60 s", "out_of_time": True}, "done"),
        ({"error": "out of memory", "out_of_memory": True}, "done"),
    ],
)
def test_a_model_that_fails_fails_its_part(
    record: dict[str, Any], status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "run_in_process", lambda *_: record)
    monkeypatch.setattr(train_step, "missing", lambda contender: {})
    suite = Suite(Setting(torch.device("cpu"), torch.bfloat16, 1.0, False), tmp_path / "suite.json", 60.0)
    work = gpu_suite.works(suite, arguments_of(gpu_suite), None)
    suite.part("steps", work["steps"], 60.0)
    assert suite.result["parts"]["steps"]["status"] == status
    # The same result holds Llama, which has nothing to do with it.
    monkeypatch.setattr(
        train_step, "run_in_process", lambda *_: {"rounds_ms": [[1.0]], "peak_memory_bytes": None}
    )
    suite.part("llama", work["llama"], 60.0)
    assert suite.result["parts"]["llama"]["status"] == "done"


def test_a_process_that_hangs_leaves_time_to_the_others() -> None:
    assert train_step.fair_limit_s(215.0, 8) == 60.0
    assert train_step.fair_limit_s(215.0, 2) == 215.0 and train_step.fair_limit_s(400.0, 8) == 100.0
    assert train_step.fair_limit_s(20.0, 8) == 20.0


def test_other_tests_may_be_unfinished_but_not_fail() -> None:
    assert not suite_tests.failed(UNFINISHED) and not suite_tests.failed(PASSED)
    assert suite_tests.failed(FAILED)
    assert suite_tests.failed({**UNFINISHED, "counts": {"error": 1}})
    assert suite_tests.failed({"exit_code": 2, "counts": {}})  # interrupted, as by an error in a conftest


def test_outcomes_are_counted_as_tests_finish() -> None:
    alone = """
tests/a.py::test_one[x y] PASSED                                         [ 14%]
tests/a.py::test_two SKIPPED (needs DeepSpeed)                           [ 28%]
tests/a.py::test_three FAILED                                            [ 42%]
FAILED tests/a.py::test_three - assert 1 == 2
=================== 1 failed, 1 passed, 1 skipped in 1.00s ===================
"""
    assert suite_tests.counted(alone) == {"passed": 1, "skipped": 1, "failed": 1}
    parallel = """
scheduling tests via LoadScheduling
tests/a.py::test_one 
[gw1] [ 14%] PASSED tests/a.py::test_one 
[gw0] [ 28%] PASSED tests/a.py::test_two[x y] 
[gw0] [100%] ERROR tests/a.py::test_three 
"""
    assert suite_tests.counted(parallel) == {"passed": 2, "error": 1}


def test_tests_that_do_not_end_are_ended_with_all_they_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    child = tmp_path / "child"
    (tmp_path / "test_endless.py").write_text(
        "import subprocess, time\n"
        "def test_quick(): pass\n"
        "def test_endless():\n"
        "    process = subprocess.Popen(['sleep', '300'])\n"
        f"    open({str(child)!r}, 'w').write(str(process.pid))\n"
        "    time.sleep(300)\n"
    )
    result = suite_tests.run_tests([str(tmp_path / "test_endless.py")], tmp_path / "log", limit_s=10.0)
    assert result["exit_code"] is None and not result["passed"]
    assert result["counts"] == {"passed": 1}
    process = Path(f"/proc/{child.read_text()}/stat")
    end = time.monotonic() + 10
    while process.exists() and process.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not process.exists() or process.read_text().split()[2] == "Z"


def test_failing_and_passing_tests(tmp_path: Path) -> None:
    (tmp_path / "test_mixed.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    result = suite_tests.run_tests([str(tmp_path / "test_mixed.py")], tmp_path / "log", 60.0)
    assert result["exit_code"] == 1 and not result["passed"] and suite_tests.failed(result)
    assert result["counts"] == {"passed": 1, "failed": 1} and "assert False" in result["output"]
    again = suite_tests.run_tests([str(tmp_path / "test_mixed.py")], tmp_path / "log", 60.0, ["-k", "good"])
    assert again["passed"] and again["counts"] == {"passed": 1}


def test_parts_end_by_their_budgets_and_few_parts_share_all_of_the_time() -> None:
    budgets = gpu_suite.BUDGETS_S
    ends = dict(zip(budgets, gpu_suite.ends_s(list(budgets), 540.0), strict=True))
    assert ends["gate"] == budgets["gate"] and ends["steps"] == sum(list(budgets.values())[:3])
    # What the goals of a step are about fits into one call, with time to start.
    assert ends["profile"] < 510 - 15
    two = budgets["steps"] + budgets["profile"]
    assert gpu_suite.ends_s(["steps", "profile"], 540.0) == pytest.approx([540 * budgets["steps"] / two, 540])


def test_what_the_first_parts_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run on a GPU; nothing is started here."""
    started: list[tuple[str, str, int, str]] = []

    def measure(contender: Contender, warm_up: int, steps: int, limit_s: float, trace: Any = None) -> Any:
        kind = "times" if trace is None else "profile"
        started.append((contender.preset, contender.loop, contender.tokens_per_step, kind))
        return {"rounds_ms": [[1.0]], "peak_memory_bytes": None} if trace is None else {"error": "as if"}

    monkeypatch.setattr(train_step, "run_in_process", measure)
    monkeypatch.setattr(suite_parts, "run_in_process", measure)
    monkeypatch.setattr(train_step, "missing", lambda contender: {})
    monkeypatch.setattr(gpu_suite, "memory_loop", lambda: "engine")
    suite = Suite(Setting(torch.device("cpu"), torch.bfloat16, 1.0, False), tmp_path / "suite.json", 60.0)
    work = gpu_suite.works(suite, arguments_of(gpu_suite), None)
    for name in ("steps", "steps-65k", "profile", "memory", "llama", "same-param"):
        suite.part(name, work[name], 60.0)
    dense, lpa, same = (f"3b/{variant}" for variant in ("transformer", "lpa", "same_param"))
    pairs = [(dense, "bare"), (lpa, "bare"), (dense, "engine"), (lpa, "engine")]
    assert started == [
        *((*pair, 16384, "times") for pair in [*pairs, *pairs[::-1]]),
        *((dense, loop, 65536, "times") for loop in ("bare", "engine", "engine", "bare")),
        (dense, "engine", 16384, "profile"),
        (lpa, "engine", 16384, "profile"),
        (dense, "engine", 4096, "times"),
        (lpa, "engine", 4096, "times"),
        *[(dense, "llama", 16384, "times")] * 2,
        *((same, loop, 16384, "times") for loop in ("bare", "engine", "engine", "bare")),
    ]
    assert suite.result["parts"]["profile"]["status"] == "failed"
    assert suite.result["parts"]["same-param"]["status"] == "done"


def test_which_tests_a_gpu_runs() -> None:
    (gate,), (apart, *files) = suite_tests.GATE, suite_tests.other_tests()
    # What the gate leaves out by name is what comes later by name.
    file, _, name = apart.partition("::")
    assert file == gate == "tests/kernels/test_lowdim_gpu.py"
    assert f"def {name}(" in (ROOT / file).read_text() and "inductor" in name
    assert "tests/integration/test_no_sync_gpu.py" in files and gate not in files
    assert "tests/kernels/test_lowdim_kernel.py" in files and "tests/kernels/test_tiles.py" not in files
    assert len(files) == len(set(files)) and all((ROOT / test).is_file() for test in files)


def test_memory_is_compared_without_deepspeed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert gpu_suite.memory_loop() == "engine"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu_suite.memory_loop() == "bare"


def test_the_most_telling_pairs_come_first_and_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def measure(contender: Any, *_: Any) -> dict[str, Any]:
        started.append(contender.name)
        return (
            {"error": "as if"}
            if contender.loop == "llama"
            else {"rounds_ms": [[1.0]], "peak_memory_bytes": None}
        )

    monkeypatch.setattr(train_step, "run_in_process", measure)
    monkeypatch.setattr(train_step, "missing", lambda contender: {})
    *_, result = train_step.results(arguments_of(train_step), None)
    first = ["3b/transformer bare", "3b/lpa bare", "3b/transformer engine", "3b/lpa engine"]
    rest = ["3b/same_param bare", "3b/same_param engine"]
    assert started == [*first, *first[::-1], "3b/transformer llama", *rest, *rest[::-1]]
    assert [len(record.get("all_steps_ms", [])) for record in result["contenders"]] == [2, 2, 2, 2, 0, 2, 2]


def test_no_process_starts_for_a_loop_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(
        train_step,
        "run_in_process",
        lambda contender, *_: started.append(contender.loop) or {"error": "as if"},
    )
    find = train_step.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name in ("deepspeed", "transformers") else find(name, *rest),
    )
    *_, result = train_step.results(arguments_of(train_step), None)
    assert started == ["bare"] * 3
    missing = [record.get("missing_package") for record in result["contenders"]]
    assert missing == [None, None, "deepspeed", "deepspeed", "transformers", None, "deepspeed"]
