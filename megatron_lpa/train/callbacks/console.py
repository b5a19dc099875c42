"""Records as lines for people: on a terminal, and in log files, one record each."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from typing import Any

from megatron_lpa.record_values import NOT_FINITE
from megatron_lpa.records import Record
from megatron_lpa.train.callbacks.callback import SAID, Sink
from megatron_lpa.train.state import Run

COLUMNS = 79
"""Of a line about training: a terminal of 80 columns does not wrap it."""

_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"), (1, ""))
_NEVER_SHOWN = ("kind", "step", "time", SAID, NOT_FINITE)


class Console(Sink):
    """Readable lines on stdout, and a progress bar on a terminal. What somebody has said already is not said
    again."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._steps = 0
        self._speed = Speed()
        self._day = ""

    def open(self, run: Run) -> None:
        """Start the progress bar where one is wanted."""
        self._steps = run.steps
        wanted = run.config.logging.progress_bar
        if wanted == "on" or (wanted == "auto" and sys.stderr.isatty()):
            from tqdm import tqdm

            self._bar = tqdm(total=run.steps, initial=run.progress.step, unit="step", dynamic_ncols=True)

    def write(self, record: Record) -> None:
        """One line per record, and one for each new day."""
        if record["kind"] == "event" and SAID in record:
            return
        left_s = None
        if record["kind"] == "train":
            self._speed.see(record)
            left_s = self._speed.left_s(self._steps)
        self._tell_day(record)
        self._say(describe(record, self._steps, left_s))
        if self._bar is not None and record["kind"] == "train":
            self._bar.update(record["step"] - self._bar.n)
            self._bar.set_postfix(loss=_number(record["loss"], 6))

    def rewind(self, run: Run) -> None:
        """Steps come again: measure anew."""
        self._speed = Speed()

    def close(self) -> None:
        """Finish the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def _tell_day(self, record: Record) -> None:
        day = time.strftime("%Y-%m-%d", time.localtime(record["time"])) if "time" in record else self._day
        if day != self._day:
            self._day = day
            self._say(f"on {day}:")

    def _say(self, line: str) -> None:
        try:
            self._print(line)
        except UnicodeEncodeError:  # a locale without this character, or half of one
            self._print(line.encode("ascii", "backslashreplace").decode())

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)


class Speed:
    """How long the steps that are left will take, by all that this process has done since its first
    record."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self._step_s = math.nan

    def see(self, record: Record) -> None:
        """Take note of a train record."""
        self._step_s = record["step_ms"] / 1000
        if "time" in record:
            self._last = (record["step"], record["time"])
            self._first = self._first or self._last

    def left_s(self, steps: int) -> float | None:
        """Seconds until the last step: validations and checkpoints count, as far as they have been seen."""
        if self._first is None:
            return None
        (first, began), (last, now) = self._first, self._last
        per_step = (now - began) / (last - first) if last > first else self._step_s
        left = max(0.0, (steps - last) * per_step)
        return left if math.isfinite(left) else None


def describe(record: Record, steps: int, left_s: float | None = None) -> str:
    """A record as one readable line; never an error, whatever a callback has put into it.

    Args:
        record: as sinks get it.
        steps: of the whole run.
        left_s: seconds until the last step, for lines about training.
    """
    clock, place = _clock(record), _place(record["step"], steps)
    # In one that is not ours any value may be.
    with contextlib.suppress(TypeError, ValueError, OverflowError, AttributeError):
        if (line := _ours(clock, place, record, left_s)) is not None:
            return line
    shown = {**record, **record.get(NOT_FINITE, {})}
    values = (f"{key}={_short(value)}" for key, value in shown.items() if key not in _NEVER_SHOWN)
    return _one_line(f"{clock} step {place} {record['kind']}: {' '.join(values)}".rstrip())


def _ours(clock: str, place: str, record: Record, left_s: float | None) -> str | None:
    """The line of a record of one of our kinds, with the values that ours have."""
    if record["kind"] == "train":
        return _train(clock, place, record, left_s)
    start = f"{clock} step {place}"
    if record["kind"] in ("valid", "test") and "tokens_evaluated" in record:
        return (
            f"{start} {record['kind']} loss {_loss(record)} perplexity "
            f"{_perplexity(record.get('perplexity'))} {record['tokens_evaluated']:,} tokens"
        )
    if record["kind"] == "event" and isinstance(record.get("message"), str):
        return f"{start} {_one_line(record['message'])}"
    return None


def _train(clock: str, place: str, record: Record, left_s: float | None) -> str:
    """At most ``COLUMNS`` wide; what is least missed goes first. Widths are the same from line to line."""
    mfu = record.get("mfu")
    rate = _count(record.get("tokens_per_second"))
    parts = {
        "clock": clock,
        "step": f"step {place}",
        "loss": f"loss {_number(record['loss'], 6):>6}",
        "lr": f"lr {_power(record.get('lr')):>6}",
        "norm": f"norm {_number(record.get('grad_norm'), 4):>4}",
        "rate": f"{rate:>4} tok/s",
        "mfu": "" if mfu is None else f"mfu {100 * mfu:.0f}%",
        "left": "" if left_s is None else f"eta {_duration(left_s)}",
    }
    shorter = [("step", place), ("rate", f"{rate:>4} t/s"), ("step", place.split("/")[0])]
    for part, text in (*shorter, ("mfu", ""), ("norm", ""), ("lr", "")):
        if len(" ".join(filter(None, parts.values()))) <= COLUMNS:
            break
        parts[part] = text
    return " ".join(filter(None, parts.values()))


def _clock(record: Record) -> str:
    return time.strftime("%H:%M:%S", time.localtime(record["time"])) if "time" in record else "--:--:--"


def _place(step: int, steps: int) -> str:
    """Exact; the number of all steps only as far as it is short."""
    return f"{step:>{len(str(steps))}}/{steps if steps < 100_000 else _count(steps)}"


def _loss(record: Record) -> str:
    said = record.get(NOT_FINITE, {}).get("loss")
    return (
        "not finite" + (f" ({said})" if said else "") if record["loss"] is None else f"{record['loss']:.4f}"
    )


def _perplexity(value: Any) -> str:
    return f"{value:.2f}" if value is not None and value < 1e7 else _number(value, 7)


def _number(value: Any, width: int) -> str:
    """As many digits as ``width`` characters hold; at least one, also where they do not hold it."""
    if value is None or not math.isfinite(value):
        return "nan"
    for digits in range(width - 2, -1, -1):
        text = f"{value:.{digits}f}"
        if len(text) <= width:
            return text if float(text) or not value else _power(value, 0)
    for digits in range(width - 4, -1, -1):
        text = _power(value, digits)
        if len(text) <= width:
            return text
    return text


def _power(value: Any, digits: int = 1) -> str:
    """``3.0e-4``"""
    if value is None or not math.isfinite(value):
        return "nan"
    if not value:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _count(value: Any) -> str:
    """Two digits or three, and a unit: ``1.2k``, ``12k``, ``123k``."""
    if value is None or not math.isfinite(value):
        return "nan"
    for unit, name in _UNITS:
        if value >= unit:
            number = value / unit
            return f"{number:.1f}{name}" if name and number < 9.95 else f"{number:.0f}{name}"
    return f"{value:.1g}"


def _duration(seconds: float) -> str:
    """At most five characters wide up to 999 days."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    if minutes < 99.5:
        return f"{minutes:.0f}m"
    if hours < 10 - 1 / 120:
        return f"{int(hours + 1 / 120)}h{int(minutes + 0.5) % 60:02}m"
    if hours < 48:
        return f"{hours:.1f}h"
    return f"{days:.1f}d" if days < 99.95 else f"{days:.0f}d"


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=repr)


def _one_line(text: str) -> str:
    """What a file's name or a stranger's text cannot move the cursor with."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
