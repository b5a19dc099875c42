"""Plans in parts, and their records put together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fault_injection.fault_plan import INTERVAL, SERIES, make_plan, short_plan
from fault_injection.kinds import DAMAGES, ERRORS, LINKS, MALFORMED, MISMATCHES, OPENED, PIPES
from fault_injection.record import by_kind, commit_of, merged, table
from megatron_lpa.errors import UserError

CHAOS = Path(__file__).resolve().parents[3] / "tools/chaos.py"


def test_two_thousand_faults_have_every_sort_of_every_kind() -> None:
    plan = make_plan(1, 2000)
    faults = [fault for scenario in plan for fault in scenario.faults]
    assert len(faults) == 2000

    def sorts(*kinds: str) -> set[str]:
        return {fault.variant for fault in faults if fault.kind in kinds}

    assert sorts("link") == set(LINKS) and sorts("malformed") == set(MALFORMED)
    assert sorts("pipe") == set(PIPES) and sorts("rank-mismatch") == set(MISMATCHES)
    assert sorts("damage") == set(DAMAGES)
    assert sorts("open-error") == {f"{what} {error}" for what in OPENED for error in ERRORS}
    assert {variant.split()[0] for variant in sorts("open-error-lasting")} == set(OPENED)
    # What differs is compared with rank 0.
    assert all(fault.rank for fault in faults if fault.kind == "rank-mismatch")


def test_a_stop_comes_behind_a_bad_batch_and_before_the_one_that_makes_the_run_go_back() -> None:
    homes = [s for s in make_plan(1, 2000) if any(f.kind == "stop-between-bad" for f in s.faults)]
    assert len(homes) > 3
    for home in homes:
        assert {fault.kind for fault in home.faults} == {"stop-between-bad"}
        assert sorted(home.nan_batches) == [batch for series in SERIES for batch in series]
        assert all(len(series) == home.max_skipped for series in SERIES)
        assert {f.batch for f in home.faults} <= {b for series in SERIES for b in series[:-1]}
        # The steps done behind the first series are one more than its batches; a checkpoint is due among
        # them.
        assert any((batch + 1) % INTERVAL == 0 for batch in SERIES[0])


def test_the_short_plan_has_every_kind() -> None:
    kinds = {fault.kind for scenario in short_plan(1) for fault in scenario.faults}
    assert {
        "rank-mismatch", "open-error", "open-error-lasting", "stop-between-bad", "link", "pipe", "malformed",
        "hang-start",
    } <= kinds  # fmt: skip


# Records


def fault(number: int, scenario: int, kind: str = "kill-one", **more: Any) -> dict[str, Any]:
    return {
        "number": number, "kind": kind, "scenario": scenario, "codes": [1, -9], "steps_lost": 1,
        "seconds_to_recover": 2.0, "violations": [], **more,
    }  # fmt: skip


def part(folder: Path, number: int, of: int, faults: list[dict[str, Any]], **more: Any) -> Path:
    scenarios = [
        {
            "number": n,
            "starts": 2,
            "runs": 1,
            "compile_locks_left_by_kills": 0,
            "full_disk": "",
            "violations": [],
        }
        for n in sorted({f["scenario"] for f in faults})
    ]
    record = {
        "options": {"plan": "long", "faults": 4, "seed": 1, "fresh": False},
        "commit": "abc",
        "parts": [{"part": [number, of], "seconds": 10.0, "machine": {"cpu": f"of part {number}"}}],
        "scenarios": scenarios,
        "list": faults,
        **more,
    }
    path = folder / f"part_{number}_{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(record))
    return path


def test_parts_are_put_together(tmp_path: Path) -> None:
    first = part(tmp_path, 1, 2, [fault(1, 1), fault(4, 3, steps_lost=3)])
    second = part(tmp_path, 2, 2, [fault(2, 2, "nan", codes=[0, 0]), fault(3, 2, violations=["lost"])])
    record = merged([second, first])
    assert [f["number"] for f in record["list"]] == [1, 2, 3, 4]
    assert [s["number"] for s in record["scenarios"]] == [1, 2, 3]
    assert (record["faults"], record["starts"], record["seconds"], record["violations"]) == (4, 6, 20.0, 1)
    assert record["commit"] == "abc"
    assert [p["machine"]["cpu"] for p in record["parts"]] == ["of part 1", "of part 2"]
    assert record["kinds"]["kill-one"]["faults"] == 3
    assert record["kinds"]["kill-one"]["most_steps_lost"] == 3
    assert "| kill-one (1 violations) | 3 | 3 | 2.0 / 2.0 |" in table(record["kinds"]).splitlines()


def test_parts_of_other_plans_and_commits_and_missing_ones_are_refused(tmp_path: Path) -> None:
    first = part(tmp_path, 1, 2, [fault(1, 1)])
    second = part(tmp_path, 2, 2, [fault(2, 2)])
    other = part(tmp_path, 2, 2, [fault(2, 2)], commit="def")
    seeded = part(
        tmp_path, 2, 2, [fault(2, 2)], options={"plan": "long", "faults": 4, "seed": 2, "fresh": False}
    )
    text = tmp_path / "text.json"
    text.write_text("[]")
    for paths, words in (
        ([first, other], f'{other}: commit "def", but {first} has "abc"'),
        ([first, seeded], f"{seeded}: options "),
        ([first], "parts 1/2: not each of 2 once"),
        ([first, second, second], "not each of 2 once"),
        ([first, text], f"{text}: not a record"),
        ([first, tmp_path / "none.json"], "none.json: cannot be read"),
    ):
        with pytest.raises(UserError) as raised:
            merged(paths)
        assert words in str(raised.value) and "\n" not in str(raised.value)


def test_sums_by_kind() -> None:
    rows = by_kind(
        [
            fault(1, 1, "disk-full", codes=[0, 0], seconds_to_recover=1.0),
            fault(2, 1, "disk-full", codes=[1, 1], seconds_to_recover=4.0, steps_lost=3),
            fault(3, 1, "link", codes=[78, 78], steps_lost=0),
        ]
    )
    assert rows["disk-full"]["restarts"] == 1 and rows["link"]["restarts"] == 1
    assert rows["disk-full"]["median_seconds_to_recover"] == 2.5
    assert rows["disk-full"]["most_seconds_to_recover"] == 4.0


def test_a_commit_says_when_files_differ_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "A file")
    clean = commit_of(tmp_path)
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    changed = commit_of(tmp_path)
    assert changed.startswith(f"{clean}+")
    (tmp_path / "a").write_text("3")
    assert commit_of(tmp_path) not in (clean, changed)
    assert commit_of(tmp_path / "nowhere") == "unknown"


def test_the_command_refuses_bad_parts_and_bad_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for arguments, code, words in (
        (["--part", "3/2"], 2, "'3/2' is not K/N"),
        (["--jobs", "0"], 2, "must be at least 1"),
        (["--merge", str(tmp_path / "a.json")], 78, "error: "),
    ):
        command = [sys.executable, str(CHAOS), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
