"""Runs compared in one table: size, speed, loss. Numbers come from each run folder, nothing is trained."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lpa.config import RunConfig
from megatron_lpa.engine.manifest import complete_checkpoints, described
from megatron_lpa.evaluate.metrics_file import Record, read_metrics, records_of
from megatron_lpa.evaluate.trained import read_config
from megatron_lpa.model.accounting import count_parameters, flops_per_token_training
from megatron_lpa.records import is_finite_number

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class RunSummary:
    """What a run folder says about a run; None where it says nothing.

    Args:
        label: heading of its column.
        folder: the run folder.
        layout: processes and how they were used, as words.
        parameters: all parameters.
        attention_parameters: those of q, k, v, o of all layers.
        flops_per_token: model FLOPs of forward and backward, per token.
        steps: optimizer steps done.
        tokens: tokens trained on.
        tokens_per_second: over all processes, median over the train records after the first.
        step_ms: likewise.
        peak_memory_bytes: largest memory of the first process: of its GPU, or resident without one.
        train_loss: of the last logging interval, nats per token.
        valid_loss: the last one.
        test_loss: the last one.
    """

    label: str
    folder: Path
    layout: str | None
    parameters: int
    attention_parameters: int
    flops_per_token: int
    steps: int | None
    tokens: int | None
    tokens_per_second: float | None
    step_ms: float | None
    peak_memory_bytes: float | None
    train_loss: float | None
    valid_loss: float | None
    test_loss: float | None


def summarize(folder: Path, label: str | None = None) -> RunSummary:
    """Read one run folder.

    Raises:
        UserError: no run folder, or records that cannot be read.
    """
    config = read_config(folder)
    records = read_metrics(folder)
    train, valid, test = (records_of(records, kind) for kind in ("train", "valid", "test"))
    parameters = count_parameters(config.model)
    # The first interval pays for allocations and caches.
    settled = train[1:]
    return RunSummary(
        label=label or folder.resolve().name,
        folder=folder,
        layout=_layout(folder, config),
        parameters=parameters.total,
        attention_parameters=parameters.attention,
        flops_per_token=flops_per_token_training(config.model),
        steps=_last(train, "step"),
        tokens=_last(train, "tokens"),
        tokens_per_second=_median(settled, "tokens_per_second"),
        step_ms=_median(settled, "step_ms"),
        peak_memory_bytes=max(_values(train, "memory_peak_bytes"), default=None),
        train_loss=_last(train, "loss"),
        valid_loss=_last(valid, "loss"),
        test_loss=_last(test, "loss"),
    )


@dataclass(frozen=True)
class _Row:
    title: str
    value: Callable[[RunSummary], float | str | None]
    form: Callable[[float], str]
    ratio: bool = True


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(loss) if loss < 700 else math.inf


_ROWS = (
    _Row("processes", lambda run: run.layout, str, ratio=False),
    _Row("parameters", lambda run: run.parameters, lambda n: f"{n:,.0f}"),
    _Row("of them in attention", lambda run: run.attention_parameters, lambda n: f"{n:,.0f}"),
    _Row("training FLOPs per token", lambda run: run.flops_per_token, lambda n: f"{n / 1e6:,.1f} M"),
    _Row("steps", lambda run: run.steps, lambda n: f"{n:,.0f}", ratio=False),
    _Row("tokens trained on", lambda run: run.tokens, lambda n: f"{n:,.0f}", ratio=False),
    _Row("tokens per second", lambda run: run.tokens_per_second, lambda n: f"{n:,.0f}"),
    _Row("step time", lambda run: run.step_ms, lambda n: f"{n:,.0f} ms"),
    _Row("peak memory per process", lambda run: run.peak_memory_bytes, lambda n: f"{n / 2**20:,.0f} MiB"),
    _Row("last training loss", lambda run: run.train_loss, lambda n: f"{n:.4f}"),
    _Row("validation loss", lambda run: run.valid_loss, lambda n: f"{n:.4f}"),
    _Row("validation perplexity", lambda run: _perplexity(run.valid_loss), lambda n: f"{n:,.2f}"),
    _Row("test loss", lambda run: run.test_loss, lambda n: f"{n:.4f}"),
    _Row("test perplexity", lambda run: _perplexity(run.test_loss), lambda n: f"{n:,.2f}"),
)


def comparison_table(runs: Sequence[RunSummary]) -> str:
    """A Markdown table, one column per run; with two or more, the second divided by the first."""
    header = ["", *(run.label for run in runs)]
    if len(runs) > 1:
        header.append(f"{runs[1].label} / {runs[0].label}")
    lines = [header]
    for row in _ROWS:
        values = [row.value(run) for run in runs]
        cells = [NOT_MEASURED if value is None else row.form(value) for value in values]  # type: ignore[arg-type]
        if len(runs) > 1:
            cells.append(_ratio(values[0], values[1]) if row.ratio else "")
        lines.append([row.title, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [
        [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def report_text(
    runs: Sequence[RunSummary], plot_name: str, samples: Sequence[tuple[str, Sequence[str]]]
) -> str:
    """The whole report as Markdown.

    Args:
        runs: in the order of the columns.
        plot_name: picture beside the report.
        samples: run label and texts it generated.
    """
    parts = [f"# {' and '.join(run.label for run in runs)}", comparison_table(runs)]
    parts.append(
        "Speeds are medians over the logging intervals after the first. Losses are nats per token, perplexity "
        "is per token. Memory is that of the first process: allocated on its GPU, or resident without one."
    )
    parts.append(f"![Loss by tokens and by training time]({plot_name})")
    for label, texts in samples:
        parts += [f"## Written by {label}", *(_quoted(" ".join(text.split())) for text in texts)]
    return "\n\n".join(parts) + "\n"


def _ratio(first: float | str | None, second: float | str | None) -> str:
    if isinstance(first, str) or isinstance(second, str) or first is None or second is None or first == 0:
        return ""
    return f"{second / first:.3f}"


def _quoted(text: str) -> str:
    """A Markdown code block, so that nothing in the text is markup"""
    return textwrap.indent(textwrap.fill(text, 96) or "(nothing)", "    ")


def _layout(folder: Path, config: RunConfig) -> str | None:
    complete = complete_checkpoints(folder / "checkpoints")
    if not complete:
        return None
    layout = described(complete[-1], complete=False).get("layout", {})
    keys = ("tensor_parallel_size", "data_parallel_size", "zero_stage", "precision")
    if not all(key in layout for key in keys):
        return None
    tensor, data, stage, precision = (layout[key] for key in keys)
    return f"{tensor * data} (TP {tensor} x DP {data}, ZeRO-{stage}, {precision})"


def _values(records: Sequence[Record], name: str) -> list[float]:
    """The finite numbers under ``name``."""
    found = [record.get(name) for record in records]
    return [value for value in found if is_finite_number(value)]


def _median(records: Sequence[Record], name: str) -> float | None:
    values = _values(records, name)
    return statistics.median(values) if values else None


def _last(records: Sequence[Record], name: str) -> Any:
    """A number, as ``read_metrics`` has checked, or None."""
    return records[-1][name] if records else None
