"""Figures of the whole step from its times: throughput, MFU, savings. Arithmetic only; nothing runs here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.step_config import PEERS
from megatron_lpa.config import ModelConfig
from megatron_lpa.planning.flops import flops_per_token_forward, flops_per_token_training

Record = dict[str, Any]


def saving_limit(model: ModelConfig, dense: ModelConfig) -> float:
    """The share of the dense model's step that fewer FLOPs can save: 1 - FLOPs / dense FLOPs."""
    return 1 - flops_per_token_forward(model) / flops_per_token_forward(dense)


def expected_saving(limit: float, mfu: float, reachable_mfu: float) -> float:
    """The share of a step saved if matrix time alone shrinks.

    At MFU ``mfu`` and with products running at ``reachable_mfu`` of peak, products take ``mfu /
    reachable_mfu`` of the step; that part shrinks by ``limit``.
    """
    return limit * mfu / reachable_mfu


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the values below which a tenth and nine tenths lie."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
    }


def throughput(
    model: ModelConfig, tokens: int, step_ms: float, peak_flops: float | None, training: bool = True
) -> dict[str, float | None]:
    """Tokens and model FLOPs per second, MFU.

    Args:
        model: what ran; gives the FLOPs per token.
        tokens: of one step.
        step_ms: time of one step.
        peak_flops: of the device, per second; None gives no MFU.
        training: forward and backward, or forward alone.
    """
    flops_per_token = flops_per_token_training(model) if training else flops_per_token_forward(model)
    tokens_per_second = tokens / (step_ms / 1e3)
    flops = tokens_per_second * flops_per_token
    return {
        "tokens_per_second": tokens_per_second,
        "flops_per_token": flops_per_token,
        "model_flops_per_second": flops,
        "mfu": None if peak_flops is None else flops / peak_flops,
    }


def measured(rounds_ms: Sequence[Sequence[float]]) -> Record:
    """Times of all rounds as one, and the median of each: what differs between them is drift."""
    times = [time for turn in rounds_ms for time in turn]
    return {
        "steps": len(times),
        "step_ms": spread(times),
        "round_medians_ms": [statistics.median(turn) for turn in rounds_ms],
    }


def variant_of(preset: str) -> tuple[str, str]:
    """``(family, variant)``"""
    family, _, variant = preset.partition("/")
    return family, variant


def comparisons(records: Sequence[Record], models: Mapping[tuple[str, str], ModelConfig]) -> list[Record]:
    """What the goals ask: time and memory saved against the dense model, and what the engine costs.

    Args:
        records: of contenders, those that failed included.
        models: by ``(preset, loop)``.
    """
    good = {(r["preset"], r["loop"]): r for r in records if "step_ms" in r}
    lines: list[Record] = []
    for (preset, loop), record in good.items():
        family, variant = variant_of(preset)
        dense = good.get((f"{family}/transformer", loop))
        if variant != "transformer" and dense is not None:
            limit = saving_limit(models[preset, loop], models[dense["preset"], loop])
            line = _saved(f"{preset} saves against {dense['preset']}, {loop}", record, dense, limit)
            lines.append(_of_calls(line, record, dense))
        bare = good.get((preset, "bare"))
        if loop == "engine" and bare is not None:
            slower = _median(record) / _median(bare) - 1
            lines.append(
                _of_calls({"what": f"{preset}: engine slower than bare loop", "time": slower}, record, bare)
            )
        if loop in PEERS and bare is not None:
            ratio = _median(bare) / _median(record)
            lines.append(
                _of_calls({"what": f"{preset}: bare loop against {loop}", "time_ratio": ratio}, record, bare)
            )
        if loop == "llama" and bare is not None:
            rate = {key: r["model_flops_per_second"] for key, r in (("llama", record), ("bare", bare))}
            above = rate["bare"] / rate["llama"] - 1
            lines.append(
                _of_calls(
                    {"what": f"{preset}: bare loop's FLOP/s above llama's", "flops": above}, record, bare
                )
            )
    return lines


def _of_calls(line: Record, *records: Record) -> Record:
    """The line, marked where its figures come from different calls: another day, and perhaps another card."""
    calls = sorted({record.get("call", 1) for record in records})
    return (
        line
        if len(calls) == 1
        else {**line, "what": f"{line['what']} (calls {' and '.join(map(str, calls))})"}
    )


def _saved(what: str, record: Record, dense: Record, limit: float) -> Record:
    line = {"what": what, "time": 1 - _median(record) / _median(dense), "limit": limit}
    line["time_ratio"] = _median(record) / _median(dense)
    # On a busy machine the fast steps are those that nobody disturbed; on an idle one this is the median's
    # saving.
    line["time_of_fast_steps"] = 1 - record["step_ms"]["p10"] / dense["step_ms"]["p10"]
    peaks = record.get("peak_memory_bytes"), dense.get("peak_memory_bytes")
    if None not in peaks:
        line["memory_ratio"] = peaks[0] / peaks[1]  # type: ignore[operator]
    return line


def _median(record: Record) -> float:
    return record["step_ms"]["median"]


def table(records: Sequence[Record], comparisons: Sequence[Record]) -> str:
    """For a person."""
    lines = [f"{'':<30}{'ms':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'memory GiB':>12}"]
    for r in records:
        name = f"{r['preset']} {r.get('loop', '')}".strip()
        if "step_ms" not in r:
            lines.append(f"{name:<30}  {r.get('error', 'not measured')[:100]}")
            continue
        mfu = "" if r["mfu"] is None else f"{r['mfu']:.1%}"
        memory = r.get("peak_memory_bytes")
        lines.append(
            f"{name:<30}{_median(r):>10.1f}{r['tokens_per_second']:>12,.0f}"
            f"{r['model_flops_per_second'] / 1e12:>10.4g}{mfu:>8}{'' if memory is None else f'{memory / 2**30:.2f}':>12}"  # noqa: E501
        )
    for line in comparisons:
        shares = {key: value for key, value in line.items() if key not in ("what", "limit")}
        parts = [f"{k} {v:.1%}" if k.endswith("ratio") else f"{k} {v:+.1%}" for k, v in shares.items()]
        limit = f" (FLOPs allow {line['limit']:.1%})" if "limit" in line else ""
        lines.append(f"{line['what']}: {', '.join(parts)}{limit}")
    return "\n".join(lines)
