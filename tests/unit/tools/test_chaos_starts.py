"""What the fault injection makes of starts with links and pipes in the run folder, and of those that go
back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fault_injection import judge
from fault_injection.fault_plan import Fault, Layout, Scenario
from fault_injection.kinds import LINKS, MAY_STAY
from fault_injection.launches import Event
from fault_injection.one_start import Result, Start
from fault_injection.planting import Planted, tree
from fault_injection.scenario import Going
from megatron_lpa import files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints/step_00000003").mkdir(parents=True)
    (folder / "checkpoints/step_00000003/manifest.json").write_text("{}")
    return folder


def judged(planted: Planted, code: int, trained: bool, line: str = "") -> list[str]:
    """Violations of a start that ended so with ``planted`` in its run folder."""
    result = Result(Fault(1, "link"), 1, "", 1, 0.0, 0)
    ranks = SimpleNamespace(codes={0: code}, text=lambda ending: [line])
    start = SimpleNamespace(trained=trained, ranks=ranks, faults={})
    going = SimpleNamespace(
        _planted=planted, _planted_result=result, _queue=[], _skipped=[], _run=planted.path, _newest=lambda: 0
    )
    assert Going._was_refused(cast(Going, going), cast(Start, start), 1.0) == (not trained and code != 0)
    return result.violations


@pytest.mark.parametrize("link", LINKS)
def test_a_link_that_a_start_neither_refuses_nor_replaces_is_found_out(
    link: str, run: Path, tmp_path: Path
) -> None:
    sort, _, name = link.partition(" ")
    found = judged(Planted(run, sort, name, tmp_path / "aside"), 0, trained=True)
    assert found == (
        [] if link in MAY_STAY else [f"not refused, and {name} is still what was planted ({sort})"]
    )


@pytest.mark.parametrize("sort", ["symbolic", "hard", "dangling", "pipe"])
def test_what_a_start_replaces_is_fine(sort: str, run: Path, tmp_path: Path) -> None:
    planted = Planted(run, sort, "config.yaml", tmp_path / "aside")
    files.write_whole(run / "config.yaml", "own")
    assert judged(planted, 0, trained=True) == []
    assert (run / "config.yaml").read_text() == "own"


@pytest.mark.parametrize("made", ["logs", "config.yaml", ".lock"])
def test_a_refused_start_changes_nothing_in_the_run_folder(made: str, run: Path, tmp_path: Path) -> None:
    line = "error: run/metrics.jsonl: a link\n"
    assert judged(Planted(run, "symbolic", "metrics.jsonl", tmp_path / "aside"), 78, False, line) == []
    planted = Planted(run, "symbolic", "metrics.jsonl", tmp_path / "aside")
    (run / made).mkdir() if made == "logs" else (run / made).touch()
    assert judged(planted, 78, False, line) == [f"refused, and the run folder has changed: {made}"]


def test_a_start_that_is_refused_for_a_pipe_in_a_checkpoint_is_found_out(run: Path, tmp_path: Path) -> None:
    name = "checkpoints/step_00000003/manifest.json"
    planted = Planted(run, "pipe", name, tmp_path / "aside")
    found = judged(planted, 78, False, f"error: run/{name}: a named pipe\n")
    assert found == [f"no step was trained for {name}, where an older checkpoint was due"]


def test_new_folders_count(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    assert tree(tmp_path) == {"a": "folder", "a/b": "folder"}
    assert tree(tmp_path, ["a"]) == {}


# Starts that go back

SIGNAL = Fault(1, "stop-between-bad", variant="SIGTERM", batch=13)


def stopped(before: list[int], after: list[int], text: str) -> Start:
    """A start whose process tells of steps, is struck by a signal, and tells of more."""
    start = Start(
        1,
        Scenario(1, Layout(1, 1, 1, "fp32"), True, "continue", 18),
        Layout(1, 1, 1, "fp32"),
        [SIGNAL],
        0,
        None,
    )
    nothing = lambda *_: None  # noqa: E731
    start.ranks = cast(
        Any, SimpleNamespace(text=lambda ending: [text], signal=nothing, go=nothing, codes={0: 143})
    )
    for step in before:
        start._handle(Event(0, 0.0, {"event": "step", "step": step}), nothing)
    start._handle(Event(0, 0.0, {"event": "hold", "id": 1, "place": "bad", "step": 0}), nothing)
    for step in after:
        start._handle(Event(0, 0.0, {"event": "step", "step": step}), nothing)
    return start


BACK = "warning: went back to step_00000006 because of step 10: the loss\n"


@pytest.mark.parametrize(
    ("before", "after", "text", "newest", "fine"),
    [
        ([6, 7, 8, 9, 6, 7], [8], BACK, 8, True),
        ([6, 7, 8, 9, 6, 7], [8], BACK, 6, False),
        ([6, 7, 8, 9, 6, 7], [8], BACK, 9, False),
        ([6, 7, 8, 9], [6], BACK, 6, True),  # the signal came first
        ([6, 7, 8, 9], [], BACK, 6, True),
        ([6, 7, 8, 9, 6, 7, 8, 9], [6, 7], BACK * 2, 6, True),
        ([6, 7, 8], [9], "", 9, True),
        ([6, 7, 8], [9], "", 8, False),
    ],
)
def test_a_signal_behind_the_last_going_back_loses_nothing(
    before: list[int], after: list[int], text: str, newest: int, fine: bool
) -> None:
    found = judge.of_progress(stopped(before, after, text), newest, 0)
    assert (found == []) == fine, found
    assert fine or "stopped by a signal" in found[0]
