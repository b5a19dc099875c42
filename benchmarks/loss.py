"""The loss on one device, from the logits to their gradient: ours against torch.nn.functional.cross_entropy.

Both are computed in turns in one process, so that whatever slows the machine slows both alike. Each has
logits of its own, made anew before every turn and outside the time: ours may write the gradient over them, as
in training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.machine import describe_machine, versions_of, warn_if_busy, write_result
from benchmarks.step_figures import spread
from benchmarks.step_timing import CLOCKS, device_here, synchronize
from megatron_lpa.errors import UserError
from megatron_lpa.layers.cross_entropy import vocab_parallel_cross_entropy
from megatron_lpa.model.dtypes import weights_dtype
from megatron_lpa.parallel.groups import ParallelGroups

HELP = "the loss, forward and backward, against torch.nn.functional.cross_entropy"
WARM_UP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="rows of logits (default: 512)")
    parser.add_argument("--ids", type=int, default=32000, metavar="N", help="columns (default: 32000)")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="of each (default: 50)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: time that this process computed, for a shared machine without a GPU")  # fmt: skip  # noqa: E501
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the result")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table, records where asked.

    Raises:
        UserError: a number that cannot be.
    """
    for name in ("tokens", "ids", "repeats"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; give 1 or more")
    device, machine = device_here(), describe_machine()
    warn_if_busy(machine)
    if arguments.clock == "cpu" and device.type != "cpu":
        raise UserError("--clock cpu sees nothing of a GPU's time; leave it out")
    given = (arguments.tokens, arguments.ids, arguments.repeats, arguments.clock)
    cases = [measured(precision, *given, device) for precision in arguments.precisions]
    for case in cases:
        ours, theirs = case["ours_ms"]["median"], case["torch_ms"]["median"]
        print(f"{case['precision']}: ours {ours:.1f} ms, torch {theirs:.1f} ms, ratio {case['ratio']:.2f}")
    result = {
        "benchmark": "loss",
        "machine": machine,
        "device": {"type": device.type},
        "versions": versions_of(("torch", "triton")),
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "tokens": arguments.tokens,
        "ids": arguments.ids,
        "repeats": arguments.repeats,
        "cases": cases,
    }
    write_result(arguments.output, result)


def measured(
    precision: str, tokens: int, ids: int, repeats: int, clock: str, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of both and the ratio of their medians."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, tokens, ids, generator=generator).to(device, weights_dtype(precision))
    labels = torch.randint(ids, (1, tokens), generator=generator).to(device)
    groups = ParallelGroups.single()

    def ours(logits: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(logits, labels, groups, ids, "auto", overwrite=True).mean()

    def theirs(logits: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    times: dict[str, list[float]] = {"ours_ms": [], "torch_ms": []}
    for repeat in range(WARM_UP + repeats):
        turns = [("ours_ms", ours), ("torch_ms", theirs)]
        for name, loss in turns if repeat % 2 == 0 else reversed(turns):
            logits = scores.clone().requires_grad_()
            synchronize(device)
            start = CLOCKS[clock]()
            loss(logits).backward()
            synchronize(device)
            if repeat >= WARM_UP:
                times[name].append(1e3 * (CLOCKS[clock]() - start))
    figures = {name: spread(values) for name, values in times.items()}
    ratio = figures["ours_ms"]["median"] / figures["torch_ms"]["median"]
    return {"precision": precision, **figures, "ratio": ratio}
