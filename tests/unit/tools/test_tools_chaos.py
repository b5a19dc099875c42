"""What the fault injection takes for a broken promise, without any process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fault_injection import checks
from fault_injection.disk import damage
from fault_injection.fault_plan import make_plan, short_plan
from fault_injection.kinds import DAMAGES, SHARES, SITES
from megatron_lpa.checkpoint.manifest import sealed


def test_a_plan_follows_from_its_seed_and_leaves_nothing_out() -> None:
    plan = make_plan(1, 200)
    assert plan == make_plan(1, 200) != make_plan(2, 200)
    faults = [fault for scenario in plan for fault in scenario.faults]
    assert [fault.number for fault in faults] == list(range(1, 201))
    assert {fault.kind for fault in faults} == set(SHARES)
    assert {fault.site for fault in faults if fault.kind == "kill-in-save"} == set(SITES)
    assert {fault.variant for fault in faults if fault.kind == "damage"} == set(DAMAGES)
    assert {scenario.layout.zero for scenario in plan} == {1, 2, 3}
    assert {scenario.layout.tp for scenario in plan} == {1, 2}
    assert {scenario.overlap for scenario in plan} == {True, False}
    assert len([fault for scenario in short_plan(1) for fault in scenario.faults]) == 23


@pytest.mark.parametrize("count", [1, 17, 60, 500, 2000])
def test_a_plan_has_as_many_faults_as_were_asked_for(count: int) -> None:
    plan = make_plan(3, count)
    assert sum(len(scenario.faults) for scenario in plan) == count
    # Where the layout changes, the end is compared with an undisturbed run: of one precision.
    assert {scenario.layout.precision for scenario in plan if scenario.moving} <= {"fp32"}


def checkpoint(folder: Path, value: float) -> None:
    (folder / "state").mkdir(parents=True)
    files = {}
    for name in ("state/rank_00000.safetensors", "state/rank_00001.safetensors"):
        save_file({"w": torch.full((8,), value)}, folder / name)
        content = (folder / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(sealed({"files": files})))


def complete_run(folder: Path, steps: int = 4) -> Path:
    checkpoint(folder / f"checkpoints/step_{steps:08d}", 1.0)
    lines = [{"kind": "train", "step": n, "loss": 1 / n, "samples": 8 * n} for n in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rewrite(run: Path, old: str, new: str) -> None:
    path = run / "metrics.jsonl"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def another_state(run: Path) -> None:
    path = run / "checkpoints/step_00000004"
    path.rename(run / "old")
    checkpoint(path, 1.0000001)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a step twice": (lambda run: rewrite(run, '"step": 3', '"step": 2'), "has the steps [1, 2, 2, 4]"),
    "another loss": (lambda run: rewrite(run, "0.25", "0.25000001"), "train loss is 0.25000001, not 0.25"),
    "torn records": (lambda run: rewrite(run, "0.25", ""), "metrics.jsonl is torn"),
    "a leftover": (lambda run: (run / "checkpoints/.step_00000003.partial").mkdir(), "left behind"),
    "another state": (another_state, "differ from the undisturbed run's"),
    "damage": (
        lambda run: damage(run / "checkpoints", run / "checkpoints/step_00000004", "bit-flipped", 1),
        "differs from the manifest",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_is_not_the_undisturbed_one_is_found_out(name: str, tmp_path: Path) -> None:
    reference, run = complete_run(tmp_path / "reference"), complete_run(tmp_path / "run")
    assert checks.of_complete_run(run, reference, 4, exact=True) == []
    breaking, words = BROKEN[name]
    breaking(run)
    found = checks.of_complete_run(run, reference, 4, exact=True)
    assert any(words in line for line in found), found


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "deleted"])
def test_damage_leaves_a_checkpoint_unsound(kind: str, tmp_path: Path) -> None:
    newest = tmp_path / "step_00000006"
    checkpoint(newest, 1.0)
    assert checks.unsound(newest) == ""
    damaged = damage(tmp_path, newest, kind, 5)
    assert damaged is not None and checks.unsound(damaged)
    assert (damaged == newest) == (kind != "half-copied")


@pytest.mark.parametrize("first", [kind for kind in DAMAGES if kind != "deleted"])
def test_damage_of_one_checkpoint_after_another(first: str, tmp_path: Path) -> None:
    for step in (3, 6):
        checkpoint(tmp_path / f"step_{step:08d}", 1.0)
    damaged = damage(tmp_path, tmp_path / "step_00000006", first, 5)
    copied = damage(tmp_path, tmp_path / "step_00000003", "half-copied", 5)
    assert copied not in (None, damaged) and checks.unsound(copied) and checks.unsound(damaged)
    assert checks.unsound(tmp_path / "step_00000003") == ""


def test_logs_with_tracebacks_and_lines_of_unknown_kinds_are_found_out() -> None:
    assert checks.of_logs(["note: a\nwarning: b\nerror: c\n", ""]) == []
    assert checks.of_logs(["", "Traceback (most recent call last):\nValueError: no\n"]) == [
        "rank 1's log has a traceback or a crash: ValueError: no"
    ]
    assert "of another kind: [W1122" in checks.of_logs(["[W1122 ProcessGroup] hello\n"])[0]
