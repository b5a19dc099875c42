"""The kernel benchmark's records as tables."""

from __future__ import annotations

from typing import Any

from benchmarks.kernel_timing import Ceilings

BASELINES = ("separate", "separate compiled")
"""Shown apart: compiling takes so long that a short run has the second for some shapes only."""


def ceilings_line(ceilings: Ceilings) -> str:
    flops, moved = ceilings.flops / 1e12, ceilings.bytes / 1e12
    return f"ceilings: {flops:.4g} TFLOP/s matrix product, {moved:.4g} TB/s copy"


def table(record: dict[str, Any]) -> str:
    """Times of the device and the host, how many times faster than each baseline, and the share of the
    bound."""
    lines = [f"{record['tokens']} tokens, d {record['width']}, r {record['rank']}"]
    for key in ("plain", "with_norm_and_rotary"):
        if not record.get(key):
            continue
        figures = record[key]
        for column, bound in record["bound_us"].items():
            lines.append(
                f"  {key.replace('_', ' ') + ', ' + column:<32}{'device us':>11}{'host us':>10}"
                + "".join(f"{'vs ' + name:>22}" for name in BASELINES)
                + f"{'bound/time':>12}"
            )
            for name, figure in figures.items():
                if "error" in figure:
                    lines.append(f"    {name:<30}{figure['error'][:90]}")
                    continue
                times = figure[column]
                ratios = "".join(
                    f"{ratio(figures.get(base), column, times['device_us']):>22}" for base in BASELINES
                )
                lines.append(
                    f"    {name:<30}{times['device_us']:>11.1f}{times['host_us']:>10.1f}{ratios}"
                    f"{bound / times['device_us']:>12.0%}"
                    f"{'' if times.get('host_ahead', True) else ' (host not ahead)'}"
                )
    return "\n".join(lines)


def ratio(baseline: dict[str, Any] | None, column: str, device_us: float) -> str:
    """How many times faster than a baseline; a dash where that was not measured."""
    if baseline is None or "error" in baseline:
        return "-"
    return f"{baseline[column]['device_us'] / device_us:.2f}x"
