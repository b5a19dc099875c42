"""Runs compared in one table: size, speed, loss. Numbers come from each run folder, nothing is trained."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lpa.checkpoint.manifest import complete_checkpoints, described
from megatron_lpa.config import RunConfig
from megatron_lpa.evaluate.comparable import (
    HELD_OUT,
    Terms,
    bits_per_byte,
    comparable,
    notes,
    same_data,
    same_tokenizer,
    terms_of,
    text_bytes,
)
from megatron_lpa.evaluate.metrics_file import Record, read_metrics, records_of
from megatron_lpa.evaluate.trained import read_config
from megatron_lpa.planning.flops import flops_per_token_training
from megatron_lpa.planning.parameters import count_parameters
from megatron_lpa.records import is_finite_number, perplexity
from megatron_lpa.run_folder import CHECKPOINTS

NOT_MEASURED = "not measured"
NOT_FINITE = "not finite"
NOT_COMPARABLE = "not comparable"


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
        test_loss: of the weights that training ended with; of earlier ones it does not count. A loss that was
            not finite is NaN.
        terms: what the losses are of.
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
    terms: Terms


def summarize(folder: Path, label: str | None = None) -> RunSummary:
    """Read one run folder.

    Raises:
        UserError: no run folder, or records that cannot be read.
    """
    config = read_config(folder)
    records = read_metrics(folder)
    train, valid, test = (records_of(records, kind) for kind in ("train", "valid", "test"))
    # A run that was complete and went on has tests of earlier weights on record, too.
    test = [record for record in test if record["step"] >= (_last(train, "step") or 0)]
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
        train_loss=_last_loss(train),
        valid_loss=_last_loss(valid),
        test_loss=_last_loss(test),
        terms=terms_of(folder, {"valid": _evaluated(valid), "test": _evaluated(test)}),
    )


@dataclass(frozen=True)
class _Row:
    title: str
    value: Callable[[RunSummary], float | str | None]
    form: Callable[[float], str]
    ratio: bool = True
    kind: str | None = None
    """Of a loss: which one it is."""


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else perplexity(loss)


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
    _Row("last training loss", lambda run: run.train_loss, lambda n: f"{n:.4f}", kind="train"),
    _Row("validation loss", lambda run: run.valid_loss, lambda n: f"{n:.4f}", kind="valid"),
    _Row(
        "validation perplexity", lambda run: _perplexity(run.valid_loss), lambda n: f"{n:,.2f}", kind="valid"
    ),
    _Row("test loss", lambda run: run.test_loss, lambda n: f"{n:.4f}", kind="test"),
    _Row("test perplexity", lambda run: _perplexity(run.test_loss), lambda n: f"{n:,.2f}", kind="test"),
)


def bits_per_byte_rows(runs: Sequence[RunSummary]) -> list[_Row]:
    """Rows of what can be compared where tokenizers differ; none where they do not, or where it is not known
    of all.

    The data is read for it, and its text counted.
    """
    if same_tokenizer([run.terms for run in runs]):
        return []
    rows = []
    for kind, title in HELD_OUT.items():
        values = {run.folder: _bits_per_byte(run, kind) for run in runs}
        if None not in values.values():
            one_text = all(same_data(runs[0].terms, run.terms, kind) for run in runs)
            rows.append(_Row(f"{title} bits per byte", partial(_of_folder, values), _four_digits, one_text))
    return rows


def _of_folder(values: dict[Path, float | None], run: RunSummary) -> float | None:
    return values[run.folder]


def _four_digits(number: float) -> str:
    return f"{number:.4f}"


def _bits_per_byte(run: RunSummary, kind: str) -> float | None:
    loss = run.valid_loss if kind == "valid" else run.test_loss
    tokens = run.terms.tokens[kind]
    if loss is None or not tokens:
        return None
    counted = text_bytes(run.folder, kind, tokens)
    return bits_per_byte(loss, tokens, counted) if counted else None


def comparison_table(runs: Sequence[RunSummary], more: Sequence[_Row] = ()) -> str:
    """A Markdown table, one column per run; with two or more, the second divided by the first.

    Args:
        runs: in the order of the columns.
        more: rows that follow the others.
    """
    header = ["", *(run.label for run in runs)]
    if len(runs) > 1:
        header.append(f"{runs[1].label} / {runs[0].label}")
    lines = [header]
    for row in (*_ROWS, *more):
        values = [row.value(run) for run in runs]
        cells = [_cell(value, row.form) for value in values]
        if len(runs) > 1:
            alike = row.kind is None or comparable([run.terms for run in runs[:2]], row.kind)
            cells.append("" if not row.ratio else _ratio(values[0], values[1]) if alike else NOT_COMPARABLE)
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


def _cell(value: float | str | None, form: Callable[[Any], str]) -> str:
    if value is None:
        return NOT_MEASURED
    return NOT_FINITE if isinstance(value, float) and not math.isfinite(value) else form(value)


def report_text(
    runs: Sequence[RunSummary], plot_name: str, samples: Sequence[tuple[str, Sequence[str]]]
) -> str:
    """The whole report as Markdown.

    Args:
        runs: in the order of the columns.
        plot_name: picture beside the report.
        samples: run label and texts it generated.
    """
    more = bits_per_byte_rows(runs)
    parts = [f"# {' and '.join(run.label for run in runs)}", comparison_table(runs, more)]
    parts += [
        f"**Note:** {note}"
        for note in notes([run.label for run in runs], [run.terms for run in runs], bool(more))
    ]
    parts.append(
        "Speeds are medians over the logging intervals after the first. Losses are nats per token, "
        "perplexity is per token. Memory is that of the first process: allocated on its GPU, or resident "
        "without one."
    )
    parts.append(f"![Loss by tokens and by training time]({plot_name})")
    for label, texts in samples:
        parts += [f"## Written by {label}", *(_quoted(" ".join(text.split())) for text in texts)]
    return "\n\n".join(parts) + "\n"


def _ratio(first: float | str | None, second: float | str | None) -> str:
    if isinstance(first, str) or isinstance(second, str) or first is None or second is None or first == 0:
        return ""
    if not (math.isfinite(first) and math.isfinite(second)):
        return ""
    return f"{second / first:.3f}"


def _quoted(text: str) -> str:
    """A Markdown code block, so that nothing in the text is markup"""
    return textwrap.indent(textwrap.fill(text, 96) or "(nothing)", "    ")


def _layout(folder: Path, config: RunConfig) -> str | None:
    complete = complete_checkpoints(folder / CHECKPOINTS)
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


def _last_loss(records: Sequence[Record]) -> float | None:
    loss = _last(records, "loss")
    return math.nan if records and loss is None else loss


def _evaluated(records: Sequence[Record]) -> int | None:
    found = records[-1].get("tokens_evaluated") if records else None
    return found if isinstance(found, int) else None
