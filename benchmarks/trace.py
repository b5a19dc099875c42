"""Where a step's time goes, from a profiler's trace (Chrome's format). Reads events; runs nothing.

On a GPU what counts is the time of kernels and copies on the device; on a CPU the time of operators without
the operators inside them.
"""

from __future__ import annotations

import bisect
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]

STEP = "benchmark step"
"""The annotation that ``step_profile`` puts around each step."""

ANNOTATED = (
    ("ZeRO-3 parameter gather", re.compile(r"^benchmark parameter gather")),
    ("ZeRO-3 gradient reduction", re.compile(r"^benchmark gradient reduction")),
    ("optimizer", re.compile(r"^Optimizer\.step#|^benchmark optimizer")),
)
"""Work whose kernels have no names of their own, by the annotations that it is launched in, first match
first. PyTorch's optimizers have one; the others are made in ``step_loops``: around clipping and rounding, and
around what DeepSpeed does."""

CATEGORIES = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|broadcast|c10d::|gloo"),
    ("low-dimensional kernels", r"^forward_kernel|^input_gradient_kernel|megatron_lpa::lowdim"),
    ("attention", r"flash|fmha|scaled_dot_product|sdpa|cudnn_attention|_attention"),
    ("optimizer", r"adam"),
    ("matrix products",
    r"gemm|gemv|cutlass|nvjet|cublas|splitk|aten::(mm|bmm|addmm|baddbmm|matmul|linear)$|mkldnn"),
    ("copies", r"memcpy|memset|aten::(copy_|_to_copy|clone|contiguous|cat|fill_|zero_)$|catarray|direct_copy"),  # noqa: E501
)  # fmt: skip
"""Name of a category and what the names of its kernels contain, first match first; the rest is elementwise:
norms, activations, rotary embedding, loss, residual additions, reductions, and kernels made by
torch.compile."""

REST = "elementwise"
WAITS = {
    "stream": ("cudaStreamSynchronize", "cuStreamSynchronize"),
    "device": ("cudaDeviceSynchronize", "cuCtxSynchronize"),
    "event": ("cudaEventSynchronize", "cuEventSynchronize"),
}
"""Calls in which the host waits for the GPU, by what it waits for."""

ATTENTION_BACKENDS = (
    ("cuDNN", r"cudnn"),
    ("FlashAttention", r"flash_(fwd|bwd)|flash_attention|flashattn"),
    ("memory-efficient", r"fmha|efficient_attention|AttentionKernel|AttentionBackward"),
)
"""Libraries that compute attention, and what the names of their kernels contain, first match first."""


def read_events(path: Path) -> list[Event]:
    """Events with a duration of a trace, gzip or not."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = json.loads(content)["traceEvents"]
    return [e for e in events if e.get("ph") == "X" and "dur" in e]


def category_of(name: str) -> str:
    """By the name of a kernel or operator."""
    for category, pattern in CATEGORIES:
        if re.search(pattern, name, re.IGNORECASE):
            return category
    return REST


def self_times(operators: Sequence[Event]) -> list[float]:
    """Microseconds of each event without the events nested in it, on its own thread; in the order given."""
    own = [float(e["dur"]) for e in operators]
    threads: dict[Any, list[int]] = defaultdict(list)
    for index, event in enumerate(operators):
        threads[event.get("pid"), event.get("tid")].append(index)
    for indices in threads.values():
        indices.sort(key=lambda i: (operators[i]["ts"], -operators[i]["dur"]))
        open_ones: list[int] = []
        for index in indices:
            start = operators[index]["ts"]
            while open_ones and start >= _end(operators[open_ones[-1]]):
                open_ones.pop()
            if open_ones:
                own[open_ones[-1]] -= operators[index]["dur"]
            open_ones.append(index)
    return [max(0.0, time) for time in own]


def covered_us(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of the events runs."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        total += max(0.0, _end(event) - max(reached, event["ts"]))
        reached = max(reached, _end(event))
    return total


def _end(event: Event) -> float:
    return event["ts"] + event["dur"]


def attention_backend(names: Iterable[str]) -> str | None:
    """The library that computed attention, by the names of all kernels; None where none is known."""
    attention = [name for name in names if category_of(name) == "attention"]
    for backend, pattern in ATTENTION_BACKENDS:
        if any(re.search(pattern, name, re.IGNORECASE) for name in attention):
            return backend
    return None


class _Spans:
    """Whether a moment of a thread lies in one of some annotations, which may be nested."""

    def __init__(self, annotations: Iterable[Event]) -> None:
        self.by_thread: dict[Any, list[tuple[float, float]]] = defaultdict(list)
        for event in sorted(annotations, key=lambda e: e["ts"]):
            spans = self.by_thread[event.get("tid")]
            if spans and event["ts"] < spans[-1][1]:
                spans[-1] = (spans[-1][0], max(spans[-1][1], _end(event)))
            else:
                spans.append((event["ts"], _end(event)))

    def holds(self, event: Event) -> bool:
        spans = self.by_thread.get(event.get("tid"), [])
        index = bisect.bisect_right(spans, (event["ts"], float("inf"))) - 1
        return index >= 0 and event["ts"] < spans[index][1]


def summary(events: Sequence[Event]) -> dict[str, Any]:
    """Milliseconds per step by category, idle time, synchronisations, and the largest single entries.

    Raises:
        ValueError: the trace has no step.
    """
    annotations = [e for e in events if e.get("cat") == "user_annotation"]
    steps = [e for e in annotations if e["name"] == STEP]
    if not steps:
        raise ValueError(f"the trace has no annotation {STEP!r}")
    annotated = [
        (category, _Spans(e for e in annotations if pattern.search(e["name"])))
        for category, pattern in ANNOTATED
    ]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_gpu = bool(kernels)
    if on_gpu:
        launches = {
            e["args"]["correlation"]: e
            for e in events
            if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
        }
        # Work that the device does for a step goes on after the host has left it.
        window = (min(e["ts"] for e in kernels), max(_end(e) for e in kernels))
        entries = [(e, float(e["dur"])) for e in kernels]
        busy_us = covered_us(kernels)
    else:
        launches = {}
        window = (min(e["ts"] for e in steps), max(_end(e) for e in steps))
        operators = [e for e in events if e.get("cat") == "cpu_op" and window[0] <= e["ts"] < window[1]]
        entries = list(zip(operators, self_times(operators), strict=True))
        busy_us = covered_us(operators)
    categories: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event, time_us in entries:
        source = launches.get(event.get("args", {}).get("correlation"), event) if on_gpu else event
        category = category_of(event["name"])
        if category != "communication":
            category = next((name for name, spans in annotated if spans.holds(source)), category)
        categories[category] += time_us
        names[event["name"]][0] += time_us
        names[event["name"]][1] += 1
    count, span_us = len(steps), window[1] - window[0]
    largest = sorted(names.items(), key=lambda item: -item[1][0])[:25]
    inside = [e for e in events if window[0] <= e["ts"] < window[1]]
    return {
        "steps": count,
        "on_gpu": on_gpu,
        "step_ms": span_us / 1e3 / count,
        "categories_ms": {
            name: time_us / 1e3 / count for name, time_us in sorted(categories.items(), key=lambda c: -c[1])
        },
        "idle_ms": (span_us - busy_us) / 1e3 / count,
        "launches_per_step": len(entries) / count,
        "host_waits_per_step": {
            kind: sum(e["name"] in calls for e in inside) / count for kind, calls in WAITS.items()
        },
        "attention_backend": attention_backend(names),
        "values_read_back_per_step": sum(e["name"] == "aten::_local_scalar_dense" for e in inside) / count,
        "largest": [
            {"name": name[:160], "ms_per_step": time_us / 1e3 / count, "calls_per_step": calls / count, "category": category_of(name)}  # noqa: E501
            for name, (time_us, calls) in largest
        ],
    }  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    """For a person. Shares are of the step; on several streams they can add up to more than all of it."""
    step = figures["step_ms"]
    lines = [f"{figures['steps']} steps of {step:.2f} ms, time of {'the GPU' if figures['on_gpu'] else 'operators on the CPU'}"]  # fmt: skip  # noqa: E501
    for name, time_ms in [*figures["categories_ms"].items(), ("idle gaps", figures["idle_ms"])]:
        lines.append(f"  {name:<26}{time_ms:>10.3f} ms{time_ms / step:>8.1%}")
    lines.append(
        f"  per step: {figures['launches_per_step']:.0f} "
        f"{'kernels and copies' if figures['on_gpu'] else 'operators'}, waits of the host "
        f"{', '.join(f'{n:.1f} ({kind})' for kind, n in figures['host_waits_per_step'].items())}, "
        f"{figures['values_read_back_per_step']:.1f} values read back"
    )
    for entry in figures["largest"][:12]:
        lines.append(
            f"  {entry['ms_per_step']:>10.3f} ms {entry['calls_per_step']:>7.1f}x  {entry['name'][:90]}"
        )
    return "\n".join(lines)
