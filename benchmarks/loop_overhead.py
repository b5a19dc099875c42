"""Our training step in one process against a bare PyTorch loop of the same model.

    python benchmarks/loop_overhead.py [--preset tiny/lpa] [--steps 30] [--output FILE.json] [overrides]

Both run in this process, in turns of a few steps, on the same batches and threads, so that a noisy machine
disturbs both alike; medians over steps. The bare loop is model, loss, backward, clip, ``AdamW.step``: no
engine, no metrics, no data pipeline. Ours is the whole loop's step: reading data, engine, stop agreement.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import megatron_lpa
from megatron_lpa.config import load_config, validate_config
from megatron_lpa.data.splits import open_splits
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter
from megatron_lpa.data.storage.partial_file import write_json
from megatron_lpa.engine.build import build_engine
from megatron_lpa.engine.joining import start_distributed, stop_distributed
from megatron_lpa.model.init import initialize
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.train.alike import sample_order
from megatron_lpa.train.loop import train_one_step
from megatron_lpa.train.state import Run
from megatron_lpa.train.stopping import Stopping, StopRequest

TURN_STEPS = 5


def random_dataset(folder: Path, vocab_size: int, tokens: int) -> Path:
    """A dataset of uniformly random ids."""
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "random", np.uint16) as writer:
        writer.add_document(generator.integers(vocab_size, size=tokens).astype(np.uint16))
    return folder / "random"


def bare_loop(run: Run):
    """A function that does one optimizer step in plain PyTorch."""
    config = run.config
    decoder = Decoder(config.model, ParallelGroups.single())
    initialize(decoder, config.model, ParallelGroups.single(), config.train.seed)
    decoder.to(run.engine.device)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )
    shape = (config.train.micro_batch_size, config.model.sequence_length + 1)
    micro_batches = [torch.randint(config.model.vocab_size, shape) for _ in range(run.engine.micro_steps)]

    def step() -> None:
        optimizer.zero_grad()
        for ids in micro_batches:
            losses = decoder(ids[:, :-1], ids[:, 1:])
            (losses.mean() / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), optim.grad_clip)
        optimizer.step()

    return step


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    """Median step times of both and their ratio."""
    prefix = random_dataset(folder, 500, 400_000)
    config = load_config(
        ["--preset", arguments.preset, "--data.prefix", str(prefix), "--data.split", "1,0,0",
         "--train.precision", "fp32", "--train.deepspeed_config", arguments.deepspeed_config, *arguments.overrides]  # noqa: E501
    )  # fmt: skip
    validate_config(config, 1)
    groups = start_distributed(1)
    engine = build_engine(config, groups)
    splits = open_splits(config.data, config.model.sequence_length, config.train.seed)
    run = Run(
        config, folder, engine, splits, sample_order(config, splits), 10**6, Stopping(groups, StopRequest())
    )
    bare = bare_loop(run)

    def ours() -> None:
        train_one_step(run)

    for warm_up in (ours, bare):
        for _ in range(3):
            warm_up()
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(arguments.steps // TURN_STEPS):
        for name, step in (("ours", ours), ("bare", bare)):
            for _ in range(TURN_STEPS):
                started = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - started)
    stop_distributed()
    medians = {name: statistics.median(values) for name, values in times.items()}
    tokens = config.train.global_batch_size * config.model.sequence_length
    return {
        "benchmark": "loop_overhead",
        "preset": arguments.preset,
        "deepspeed_config": arguments.deepspeed_config,
        "precision": "fp32",
        "steps_measured": len(times["ours"]),
        "step_ms_ours": 1000 * medians["ours"],
        "step_ms_bare": 1000 * medians["bare"],
        "tokens_per_second_ours": tokens / medians["ours"],
        "tokens_per_second_bare": tokens / medians["bare"],
        "overhead_percent": 100 * (medians["ours"] / medians["bare"] - 1),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "megatron_lpa": megatron_lpa.__version__,
    }


def main() -> None:
    """Measure, print, and record where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny/lpa")
    parser.add_argument("--deepspeed-config", default="zero3")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps measured of each")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments, overrides = parser.parse_known_args()
    arguments.overrides = overrides
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    print(
        f"{result['preset']}, {result['deepspeed_config']}, {result['threads']} threads: ours "
        f"{result['tokens_per_second_ours']:,.0f} tokens/s ({result['step_ms_ours']:.1f} ms), bare PyTorch "
        f"{result['tokens_per_second_bare']:,.0f} tokens/s ({result['step_ms_bare']:.1f} ms): overhead "
        f"{result['overhead_percent']:+.1f} %"
    )
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
