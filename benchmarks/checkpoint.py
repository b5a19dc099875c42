"""How long training waits for a checkpoint, written at once and beside training, and how fast it is written.

The engine with a preset's model trains a few steps around every checkpoint, in this process, alternately with
``train.checkpoint_overlap`` off and on. ``blocked`` is all that training waits: with overlap the copy to the
CPU's memory and the agreement at the end. ``slower`` is what the steps that a write runs beside take more
than others, in all. Loading verifies every file and fills the state. Rates are of the checkpoint's bytes,
10^9 to the GB.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, versions_of, warn_if_busy, write_result

HELP = "seconds that training waits for a checkpoint, and GB/s"
INTERVAL_S = 1800.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="s1_small/lpa", help="the model (default: s1_small/lpa)")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer decoder layers")
    parser.add_argument("--deepspeed-config", default="zero3", metavar="NAME", help="default: zero3")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="checkpoints of each kind (default: 3)")  # fmt: skip  # noqa: E501
    parser.add_argument("--folder", type=Path, metavar="PATH", help="where to write; the disk decides (default: a temporary folder)")  # fmt: skip  # noqa: E501
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the result")


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table and records.

    Raises:
        UserError: an unknown preset, or a checkpoint that cannot be written.
    """
    machine = describe_machine()
    warn_if_busy(machine)
    folder = Path(tempfile.mkdtemp(prefix="checkpoints", dir=arguments.folder))
    try:
        measured = _measure(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "benchmark": "checkpoint",
        "machine": machine,
        "versions": versions_of(["megatron_lpa", "torch", "deepspeed", "safetensors"]),
        **measured,
    }
    print(table(result))
    write_result(arguments.output, result)


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    from megatron_lpa.config import load_config
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.joining import start_distributed, stop_distributed
    from megatron_lpa.planning.parameters import count_parameters

    overrides = [] if arguments.layers is None else ["--model.num_layers", str(arguments.layers)]
    config = load_config(
        ["--preset", arguments.preset, "--train.deepspeed_config", arguments.deepspeed_config,
         "--train.global_batch_size", "1", "--train.micro_batch_size", "1", "--model.dropout", "0", *overrides]  # noqa: E501
    )  # fmt: skip
    engine = build_engine(config, start_distributed(1))
    ids = torch.randint(config.model.vocab_size, (1, config.model.sequence_length + 1))

    def step() -> float:
        started = time.perf_counter()
        engine.train_step([ids], [0], 1e-4)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(3):
        step()
    plain_s = [step() for _ in range(5)]
    kinds: dict[str, list[dict[str, float]]] = {"at_once": [], "beside": []}
    loads_s = []
    for number in range(arguments.repeat):
        for kind, figures in kinds.items():
            figures.append(_save(engine, folder / kind, 2 * number + 1, kind == "beside", step))
            plain_s += [step() for _ in range(2)]
        loads_s.append(_load(engine, folder / "beside"))
    stop_distributed()
    usual_s = statistics.median(plain_s)
    for figure in kinds["beside"]:
        figure["slower_s"] = figure.pop("steps_s") - figure["steps"] * usual_s
    return {
        "preset": arguments.preset,
        "layers": config.model.num_layers,
        "deepspeed_config": arguments.deepspeed_config,
        "parameters": count_parameters(config.model).total,
        "device": str(engine.device),
        "step_s": usual_s,
        "kinds": {kind: _medians(figures) for kind, figures in kinds.items()},
        "load_s": statistics.median(loads_s),
        "repeat": arguments.repeat,
    }


def _save(engine: Any, folder: Path, number: int, overlap: bool, step: Any) -> dict[str, float]:
    from megatron_lpa.checkpoint.progress import Progress, SampleOrder
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.checkpoint.store import Retention
    from megatron_lpa.engine.engine_state import EngineState

    started = time.perf_counter()
    order = SampleOrder(0, 1, 1)
    saving = begin_save(EngineState(engine), folder, Progress(number), order, Retention(1), overlap=overlap)
    steps = []
    while not saving.written_here:
        steps.append(step())
    saving.complete()
    figures = {
        "blocked_s": saving.blocked_s,
        "total_s": time.perf_counter() - started,
        "bytes": float(saving.bytes),
    }
    return {**figures, "steps": float(len(steps)), "steps_s": sum(steps)} if overlap else figures


def _load(engine: Any, folder: Path) -> float:
    from megatron_lpa.checkpoint.manifest import complete_checkpoints
    from megatron_lpa.checkpoint.progress import SampleOrder
    from megatron_lpa.checkpoint.resume import load_checkpoint
    from megatron_lpa.engine.engine_state import EngineState

    started = time.perf_counter()
    load_checkpoint(EngineState(engine), complete_checkpoints(folder)[-1], SampleOrder(0, 1, 1))
    return time.perf_counter() - started


def _medians(figures: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(figure[key] for figure in figures) for key in figures[0]}


def table(result: dict[str, Any]) -> str:
    """For a person."""
    lines = [
        f"{result['preset']}, {result['layers']} layers, {result['parameters'] / 1e6:,.0f} M parameters, "
        f"{result['deepspeed_config']}, {result['device']}; a step takes {1000 * result['step_s']:,.0f} ms",
        f"{'':10} {'waits s':>8} {'slower s':>9} {'total s':>8} {'GB':>6} {'GB/s':>6} {'of 30 min':>10}",
    ]
    for kind, name in (("at_once", "at once"), ("beside", "beside")):
        row = result["kinds"][kind]
        cost_s = row["blocked_s"] + row.get("slower_s", 0.0)
        gigabytes = row["bytes"] / 1e9
        lines.append(
            f"{name:10} {row['blocked_s']:8.2f} {row.get('slower_s', 0.0):9.2f} {row['total_s']:8.2f} "
            f"{gigabytes:6.2f} {gigabytes / row['total_s']:6.2f} {100 * cost_s / INTERVAL_S:8.2f} %"
        )
    row = result["kinds"]["beside"]
    lines.append(f"loading: {result['load_s']:.2f} s, {row['bytes'] / 1e9 / result['load_s']:.2f} GB/s")
    return "\n".join(lines)
