"""Table 2 of the paper on this device: time and memory of an evaluation step, Transformer against LPA.

An evaluation step is forward and loss of one batch without gradients, weights in the given precision. The
paper states neither batch nor precision; here every model gets the same number of tokens per step. All models
are in memory at once and take turns of a few steps; the memory of one is its weights and what its step takes
on top.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_timing import describe, setting_of
from benchmarks.machine import versions_of, warn_if_busy, write_result
from benchmarks.step_config import run_config
from benchmarks.step_figures import Record, measured, saving_limit, table, throughput, variant_of
from benchmarks.step_loops import Loop, random_decoder
from benchmarks.step_timing import TURN_STEPS, device_here, failure, release, timed_steps
from megatron_lpa.config import ModelConfig, RunConfig
from megatron_lpa.errors import UserError
from megatron_lpa.train.hardware import peak_flops_per_second

HELP = "the paper's Table 2: time and memory of an evaluation step, Transformer against LPA"
MODELS = tuple(f"{family}/{variant}" for family in ("s1_small", "s1_medium", "3b") for variant in ("transformer", "lpa"))  # fmt: skip  # noqa: E501
PAPER = {
    "s1_small/transformer": {"step_ms": 153.4, "memory_mib": 2302},
    "s1_small/lpa": {"step_ms": 150.6, "memory_mib": 2276},
    "s1_medium/transformer": {"step_ms": 351.0, "memory_mib": 4648},
    "s1_medium/lpa": {"step_ms": 322.9, "memory_mib": 4464},
    "3b/transformer": {"step_ms": 6923.0, "memory_mib": 71.94 * 1024},
    "3b/lpa": {"step_ms": 6066.0, "memory_mib": 70.26 * 1024},
}
"""Table 2, on the paper's GPUs and batches: the ratios within a size can be compared with ours, the figures
not."""


@dataclass(frozen=True)
class Evaluated:
    """A model and its evaluation step."""

    model: ModelConfig
    sequences: int
    loop: Loop
    weight_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="PRESET", help="default: Table 2's six")  # fmt: skip  # noqa: E501
    parser.add_argument("--tokens", type=int, default=32768, metavar="N", help="tokens per step, rounded to whole sequences (default: 32768)")  # fmt: skip  # noqa: E501
    parser.add_argument(
        "--steps", type=int, default=30, metavar="N", help="steps measured of each (default: 30)"
    )
    parser.add_argument(
        "--warm-up", type=int, default=3, metavar="N", help="steps before measuring (default: 3)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers instead of the presets'")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run, as kernels.lowdim=joined; can be given again")  # fmt: skip  # noqa: E501
    parser.add_argument("--dry-run", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the result")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table, records where asked.

    Raises:
        UserError: a number that cannot be, or a model that does not exist.
    """
    for name in ("tokens", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; give 1 or more")
    last = None
    for last in results(arguments, None):
        write_result(arguments.output, last)
    assert last is not None
    print(table(last["models"], last["comparisons"]))


def config_of(preset: str, arguments: argparse.Namespace) -> RunConfig:
    """The run that is measured.

    Raises:
        UserError: an unknown preset, key or value.
    """
    changes: dict[str, Any] = {"model.num_layers": arguments.layers} if arguments.layers else {}
    if arguments.dry_run:
        changes = {"model.num_layers": 1, "model.sequence_length": 16}
    return run_config(preset, changes, arguments.set)


def evaluated(preset: str, arguments: argparse.Namespace, device: torch.device) -> Evaluated:
    """Builds one model with random weights."""
    config = config_of(preset, arguments)
    precision = "fp32" if arguments.dry_run else arguments.precision
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    decoder = random_decoder(config, device, precision).eval()
    weight_bytes = sum(p.numel() * p.element_size() for p in decoder.parameters())
    if device.type == "cuda":
        weight_bytes = torch.cuda.memory_allocated() - before
    model = config.model
    sequences = max(1, (32 if arguments.dry_run else arguments.tokens) // model.sequence_length)
    ids = torch.randint(model.vocab_size, (sequences, model.sequence_length + 1)).to(device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return decoder(ids[:, :-1], ids[:, 1:]).mean()

    return Evaluated(model, sequences, Loop(config, step, sum(p.numel() for p in decoder.parameters())), weight_bytes)  # fmt: skip  # noqa: E501


def peak_on_top(step: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a step holds at most besides what is there before it; None on a CPU."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def presets_of(arguments: argparse.Namespace) -> list[str]:
    """What is measured."""
    return ["tiny/transformer", "tiny/lpa"] if arguments.dry_run else list(arguments.models)


def request_of(preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a record is about, as it stands in a result."""
    return {
        "preset": preset,
        "tokens": arguments.tokens,
        "precision": arguments.precision,
        "layers": arguments.layers,
        "settings": list(arguments.set),
    }


def unmeasured(arguments: argparse.Namespace, known: Sequence[Record]) -> list[str]:
    """The presets that no known record is about."""
    about = [record["request"] for record in known]
    return [preset for preset in presets_of(arguments) if request_of(preset, arguments) not in about]


def results(
    arguments: argparse.Namespace, deadline: float | None, known: Sequence[Record] = ()
) -> Iterator[dict[str, Any]]:
    """The whole result after every round of turns.

    Args:
        arguments: as ``add_arguments`` defines them.
        deadline: no round starts after this, on the clock of ``time.monotonic``.
        known: records that are kept, and whose models are not measured again.
    """
    device = device_here()
    head = {
        "benchmark": "evaluate-step",
        **describe(setting_of(arguments.dry_run, 0.0)),
        "versions": versions_of(("torch", "triton")),
        "dtype": "fp32" if arguments.dry_run else arguments.precision,
        "threads": torch.get_num_threads(),
        "settings": list(arguments.set),
    }
    warn_if_busy(head["machine"])
    presets = presets_of(arguments)
    # Here, because a wrong name is the caller's to mend, not a failed measurement.
    models = {preset: config_of(preset, arguments).model for preset in presets}
    pending = unmeasured(arguments, known)
    kept = {record["preset"]: record for record in known}
    built: dict[str, Evaluated] = {}
    records: dict[str, Record] = {
        preset: {"preset": preset, "request": request_of(preset, arguments)}
        if preset in pending
        else kept[preset]
        for preset in presets
    }
    for preset in pending:
        try:
            item = evaluated(preset, arguments, device)
            for _ in range(arguments.warm_up):
                item.loop.step()
            extra = peak_on_top(item.loop.step, device)
            built[preset] = item
            records[preset] |= {
                "layers": item.model.num_layers,
                "sequences": item.sequences,
                "tokens_per_step": item.sequences * item.model.sequence_length,
                "parameters": item.loop.parameters,
                "weight_bytes": item.weight_bytes,
                "peak_memory_bytes": None if extra is None else item.weight_bytes + extra,
                "kernels": vars(item.loop.config.kernels),
            }
        except Exception as error:  # recorded; the other models' figures are worth having
            records[preset] |= failure(error)
            release()
    turns: dict[str, list[list[float]]] = {preset: [] for preset in built}
    if not built:
        yield finished(head, records, models, built, turns)
        return
    steps = 1 if arguments.dry_run else arguments.steps
    head["steps"] = steps
    for done in range(0, steps, TURN_STEPS):
        for preset, item in built.items():
            turns[preset].append(timed_steps(item.loop, min(TURN_STEPS, steps - done), device))
        yield finished(head, records, models, built, turns)
        if deadline is not None and time.monotonic() > deadline:
            break


def finished(
    head: dict[str, Any],
    records: dict[str, Record],
    models: dict[str, ModelConfig],
    built: dict[str, Evaluated],
    turns: dict[str, list[list[float]]],
) -> dict[str, Any]:
    """The result with every figure that follows from the times."""
    peak = peak_flops_per_second(None)
    for preset, item in built.items():
        record = records[preset]
        record |= measured(turns[preset])
        record |= throughput(
            item.model, record["tokens_per_step"], record["step_ms"]["median"], peak, training=False
        )
        if preset in PAPER:
            record["paper"] = PAPER[preset]
    lines = comparisons(records, models)
    return {**head, "peak_flops_per_second": peak, "models": list(records.values()), "comparisons": lines}


def comparisons(records: dict[str, Record], models: dict[str, ModelConfig]) -> list[Record]:
    """LPA against the Transformer of each family, ours and the paper's."""
    lines: list[Record] = []
    for preset, record in records.items():
        family, variant = variant_of(preset)
        dense = records.get(f"{family}/transformer")
        if variant == "transformer" or dense is None or "step_ms" not in record or "step_ms" not in dense:
            continue
        line: Record = {
            "what": f"{preset} saves against {dense['preset']}",
            "time": 1 - record["step_ms"]["median"] / dense["step_ms"]["median"],
            "limit": saving_limit(models[preset], models[dense["preset"]]),
        }
        if record["peak_memory_bytes"] and dense["peak_memory_bytes"]:
            line["memory"] = 1 - record["peak_memory_bytes"] / dense["peak_memory_bytes"]
        if preset in PAPER and dense["preset"] in PAPER:
            ours, theirs = PAPER[preset], PAPER[dense["preset"]]
            line["time_paper"] = 1 - ours["step_ms"] / theirs["step_ms"]
            line["memory_paper"] = 1 - ours["memory_mib"] / theirs["memory_mib"]
        lines.append(line)
    return lines


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    run(own.parse_args())
