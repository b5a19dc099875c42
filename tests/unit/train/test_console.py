"""What people read while a run trains: one record a line, none too wide, whatever is in it."""

from __future__ import annotations

import io
import itertools
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lpa.train.callbacks.console import COLUMNS, Console, describe

AT = time.mktime((2026, 11, 29, 14, 2, 31, 0, 0, -1))


def record(**values: Any) -> dict[str, Any]:
    figures = {
        "kind": "train", "step": 12, "time": AT, "loss": 2.34567, "lr": 2.95e-4, "grad_norm": 0.5234,
        "tokens_per_second": 123456.0, "step_ms": 500.0, "mfu": None,
    }  # fmt: skip
    return figures | values


def console(steps: int, bar: str = "off") -> Console:
    sink = Console()
    run = SimpleNamespace(
        steps=steps,
        progress=SimpleNamespace(step=0),
        config=SimpleNamespace(logging=SimpleNamespace(progress_bar=bar)),
    )
    sink.open(run)  # type: ignore[arg-type]
    return sink


def test_a_line_has_the_time_of_day_and_the_time_that_is_left() -> None:
    line = describe(record(), 1000, left_s=8000.0)
    assert line == "14:02:31 step   12/1000 loss 2.3457 lr 3.0e-4 norm 0.52 123k tok/s eta 2h13m"
    line = describe(record(mfu=0.451), 1000, left_s=8000.0)
    assert line == "14:02:31   12/1000 loss 2.3457 lr 3.0e-4 norm 0.52 123k tok/s mfu 45% eta 2h13m"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"), (99.4, "99s"), (99.6, "2m"), (5969, "99m"), (5971, "1h40m"), (7199, "2h00m"), (35969,
        "9h59m"),
        (35971, "10.0h"), (172000, "47.8h"), (272800, "3.2d"), (86400 * 120, "120d"),
    ],
)  # fmt: skip
def test_durations_are_short(seconds: float, words: str) -> None:
    assert describe(record(), 1000, left_s=seconds).endswith(f" eta {words}")


def test_no_line_about_training_is_wider_than_a_terminal() -> None:
    values = itertools.product(
        (1, 99_999, 123_456, 9_999_999, 10**11),
        (None, 0.0, 9.99999, 10.98765, 123.456, 99_999.5, 1e-9, 3.4e38),
        (0.0, 2.95e-4, 1e-12, 1.0),
        (None, 0.0, 0.001, 12.34, 9_999.9, 3.4e38),
        (0.3, 999.6, 123_456.0, 9.99e6, 1e15),
        (None, 0.0004, 0.45, 1.5),
        (None, 0.0, 35_999.0, 86_400 * 99.9, 1e9),
    )
    lengths = {}
    for step, loss, lr, norm, rate, mfu, left in values:
        for steps in (step, 2 * step):
            figures = record(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate, mfu=mfu)
            line = describe(figures, steps, left)
            lengths[len(line)] = line
            assert "loss" in line and "\n" not in line
    assert max(lengths) <= COLUMNS, lengths[max(lengths)]


def test_everything_fits_beside_the_mfu_of_a_long_run() -> None:
    line = describe(record(step=123_456, mfu=0.45, loss=10.98765), 143_000, left_s=90_000.0)
    assert line == "14:02:31 123456/143k loss 10.988 lr 3.0e-4 norm 0.52 123k t/s mfu 45% eta 25.0h"
    line = describe(record(step=1_234_567, mfu=0.45, loss=10.98765), 2_000_000, left_s=90_000.0)
    assert line == "14:02:31 1234567 loss 10.988 lr 3.0e-4 norm 0.52 123k t/s mfu 45% eta 25.0h"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"kind": "grads", "q": 0.123456789, "layers": [1, None], "name": "a b", "bad": None},
            "grads: q=0.123457 layers=[1, null] name=a b bad=null",
        ),
        ({"kind": "grads"}, "grads:"),
        ({"kind": "grads", "q": None, "k": 1.0, "not_finite": {"q": "-inf"}}, "grads: q=-inf k=1"),
        ({"kind": "event", "found": 3}, "event: found=3"),
        ({"kind": "event", "message": 5}, "event: message=5"),
        ({"kind": "grads", "message": "all well"}, "grads: message=all well"),
        ({"kind": "valid", "loss": 1.0, "tokens_evaluated": "few"}, "valid: loss=1 tokens_evaluated=few"),
        ({"kind": "test", "loss": "low", "tokens_evaluated": None}, "test: loss=low tokens_evaluated=null"),
        ({"kind": "train", "loss": 1.0, "mfu": "high", "lr": 10**400},
        f"train: loss=1 mfu=high lr={10**400}"),
        ({"kind": "event", "message": "a\x1b[2Jb\nc \u4eac"}, "a\\x1b[2Jb\\nc \u4eac"),
        ({"kind": "valid", "loss": 1.0, "tokens": 4}, "valid: loss=1 tokens=4"),
        (
            {"kind": "valid", "loss": 2.0, "perplexity": 7.389, "tokens_evaluated": 12345},
            "valid loss 2.0000 perplexity 7.39 12,345 tokens",
        ),
        (
            {"kind": "test", "loss": None, "perplexity": None, "tokens_evaluated": 9,
            "not_finite": {"loss": "nan"}},
            "test loss not finite (nan) perplexity nan 9 tokens",
        ),
        (
            {"kind": "test", "loss": 80.5, "perplexity": 9.1e34, "tokens_evaluated": 9},
            "test loss 80.5000 perplexity 9.10e34 9 tokens",
        ),
    ],
)  # fmt: skip
def test_any_record_is_a_line(given: dict[str, Any], line: str) -> None:
    assert describe({"step": 3, "time": AT, **given}, 100) == f"14:02:31 step   3/100 {line}"


def test_what_is_left_is_told_by_records_and_not_by_steps_alone(capsys: pytest.CaptureFixture[str]) -> None:
    sink = console(100)
    sink.write(record(step=10, time=AT, step_ms=500.0))
    sink.write(record(step=20, time=AT + 30))  # three seconds a step, with a validation
    sink.rewind(SimpleNamespace())  # type: ignore[arg-type]
    sink.write(record(step=10, time=AT + 40, step_ms=100.0))
    sink.write(record(step=100, time=AT + 130, step_ms=100.0))
    left = [line.split("eta ")[1] for line in capsys.readouterr().out.splitlines() if "eta" in line]
    assert left == ["45s", "4m", "9s", "0s"]


def test_what_is_left_counts_validations_that_are_far_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 100 s after each 1,000 steps of 0.1 s: wherever in between, 10,000 steps take 2,000 s, half an
    hour."""
    sink, now = console(20_000), AT
    for step in range(1, 10_001):
        now += 0.1 + (100 if step % 1000 == 0 else 0)
        if step % 10 == 0:
            sink.write(record(step=step, time=now, step_ms=100.0))
        if step in (9_990, 10_000):
            left = capsys.readouterr().out.splitlines()[-1].split("eta ")[1]
            assert 30 <= int(left.removesuffix("m")) <= 34, left


def test_each_day_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    sink = console(100)
    for step, day in enumerate((0, 0, 1, 1)):
        sink.write(record(step=step, time=AT + day * 86400))
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("on ")] == ["on 2026-11-29:", "on 2026-11-30:"]
    assert len(said) == 6


def test_what_somebody_has_said_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    sink = console(100)
    sink.write({"kind": "event", "step": 1, "time": AT, "message": "the gradient", "said": "warning"})
    assert capsys.readouterr().out == ""


def test_a_terminal_of_few_characters_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    console(100).write({"kind": "event", "step": 1, "time": AT, "message": "caf\u00e9 \udcff"})
    sys.stdout.flush()
    assert written.getvalue().endswith(b"14:02:31 step   1/100 caf\\xe9 \\udcff\n")


def test_beside_a_progress_bar_too(capsys: pytest.CaptureFixture[str]) -> None:
    sink = console(100, bar="on")
    sink.write(record(loss=None))
    sink.close()
    assert "step  12/100 loss    nan" in capsys.readouterr().out
