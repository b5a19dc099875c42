"""Loss curves of several runs side by side: by tokens and by training time (paper, Figures 2 and 3)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_lpa.data.storage.partial_file import explained_write_errors
from megatron_lpa.errors import UserError
from megatron_lpa.evaluate.metrics_file import METRICS, read_metrics, records_of
from megatron_lpa.files import write_whole

Axis = Literal["tokens", "time", "both"]
# Okabe and Ito's palette, told apart with every kind of colour vision, without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Curve:
    """The losses of one run; arrays of one value per record.

    Args:
        label: name in the legend.
        tokens: tokens trained on at each train record.
        seconds: time spent in training steps until each train record.
        loss: mean loss of the steps since the record before, nats per token; NaN where none was finite.
        valid_tokens: tokens trained on at each validation.
        valid_seconds: time spent in training steps until each validation.
        valid_loss: validation losses, nats per token; NaN where not finite.
    """

    label: str
    tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    valid_tokens: np.ndarray
    valid_seconds: np.ndarray
    valid_loss: np.ndarray


def read_curve(folder: Path, label: str) -> Curve:
    """The curve of a run folder.

    Time is the sum of the step times, so that validations, checkpoints and the pause before a resumed
    run do not count.

    Raises:
        UserError: no or bad records; see ``read_metrics``.
    """
    records = read_metrics(folder)
    train, valid = records_of(records, "train"), records_of(records, "valid")
    if not train:
        raise UserError(f"{folder / METRICS}: no train records yet; train beyond the first logging.interval")
    steps = _column(train, "step")
    seconds = np.cumsum(np.diff(steps, prepend=0.0) * _column(train, "step_ms")) / 1000
    tokens = _column(train, "tokens")
    valid_tokens = _column(valid, "tokens")
    return Curve(
        label=label,
        tokens=tokens,
        seconds=seconds,
        loss=_column(train, "loss"),
        valid_tokens=valid_tokens,
        valid_seconds=np.interp(valid_tokens, [0.0, *tokens], [0.0, *seconds]),
        valid_loss=_column(valid, "loss"),
    )


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over ``width`` neighbouring values, centred, over fewer at both ends; ``width`` 1 changes nothing.

    NaN stays NaN, and has no part in the mean of its neighbours.
    """
    assert width >= 1
    before, after = (width - 1) // 2, width // 2
    near = (values[max(0, i - before) : i + after + 1] for i in range(len(values)))
    means = [window[np.isfinite(window)] for window in near]
    return np.array(
        [part.mean() if np.isfinite(value) else np.nan for value, part in zip(values, means, strict=True)]
    )


def alone(values: np.ndarray) -> np.ndarray:
    """Which values, bool ``(n,)``, are between two gaps: a line does not show them."""
    there = np.isfinite(values)
    padded = np.concatenate([[False], there, [False]])
    return there & ~padded[:-2] & ~padded[2:]


def figure_of(curves: Sequence[Curve], axis: Axis = "both", smooth: int = 1, title: str | None = None) -> Any:
    """A matplotlib figure: lines are training losses, markers validation losses.

    Each panel begins above the steep first descent, whose scale would flatten everything after it.
    """
    # Figure without pyplot draws with Agg: no display is needed, and no state is left behind.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds = ("tokens", "time") if axis == "both" else (axis,)
    figure = Figure(figsize=(5.0 * len(kinds) + 0.4, 4.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.06})[0]
    token_scale, token_unit = _token_unit(max(float(curve.tokens[-1]) for curve in curves))
    time_scale, time_unit = _time_unit(max(float(curve.seconds[-1]) for curve in curves))
    for panel, kind in zip(panels, kinds, strict=True):
        scale = token_scale if kind == "tokens" else time_scale
        for number, curve in enumerate(curves):
            colour = COLOURS[number % len(COLOURS)]
            x, valid_x = (
                (curve.tokens, curve.valid_tokens)
                if kind == "tokens"
                else (curve.seconds, curve.valid_seconds)
            )
            losses = smoothed(curve.loss, smooth)
            panel.plot(x / scale, losses, color=colour, lw=1.8, label=curve.label)
            if (dots := alone(losses)).any():
                panel.plot(x[dots] / scale, losses[dots], ls="none", marker=".", ms=4, color=colour)
            panel.plot(
                valid_x / scale,
                curve.valid_loss,
                ls="none",
                marker=MARKERS[number % len(MARKERS)],
                ms=5.5,
                mfc="white",
                mec=colour,
                mew=1.4,
                zorder=3,
            )
        panel.set_xlabel(
            f"Tokens trained on ({token_unit})" if kind == "tokens" else f"Training time ({time_unit})"
        )
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(6))
        panel.grid(True, color="#d9d9d9", lw=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("Loss (nats per token)")
    panels[0].set_ylim(*_loss_limits(curves, smooth))
    handles, labels = panels[0].get_legend_handles_labels()
    if any(len(curve.valid_loss) for curve in curves):
        (marker,) = panels[0].plot([], [], ls="none", marker="o", ms=5.5, mfc="white", mec="#555555", mew=1.4)
        handles, labels = [*handles, marker], [*labels, "validation"]
    panels[-1].legend(handles, labels, loc="upper right", frameon=False)
    figure.suptitle(title or _title(kinds, smooth), fontsize=12)
    return figure


def save_png(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Its folder is made; a link of that name is replaced, not
    followed.

    Raises:
        UserError: it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with explained_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, buffer.getvalue())


def _column(records: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    values = np.array([record[name] for record in records], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _title(kinds: Sequence[str], smooth: int) -> str:
    by = " and by ".join("training time" if kind == "time" else kind for kind in kinds)
    return f"Training loss by {by}" + (f" (mean of {smooth} records)" if smooth > 1 else "")


def _loss_limits(curves: Sequence[Curve], smooth: int) -> tuple[float, float]:
    """From just below the lowest loss to what the losses were a twelfth of the way."""
    low, high = [], []
    for curve in curves:
        losses = smoothed(curve.loss, smooth)
        settled = losses[curve.tokens >= curve.tokens[-1] / 12]
        if not np.isfinite(settled).any():
            settled = losses
        finite = [value for value in (*settled, *curve.valid_loss) if np.isfinite(value)]
        if finite:
            low.append(min(finite))
            high.append(float(settled[np.isfinite(settled)].max(initial=min(finite))))
    if not low:
        return 0.0, 1.0
    margin = 0.06 * max(max(high) - min(low), 0.05)
    return min(low) - margin, max(high) + margin


def _token_unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= scale:
            return scale, unit
    return 1.0, "tokens"


def _time_unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((2 * 86400.0, "days"), (2 * 3600.0, "hours"), (3 * 60.0, "minutes")):
        if largest >= scale:
            return {"days": 86400.0, "hours": 3600.0, "minutes": 60.0}[unit], unit
    return 1.0, "seconds"
