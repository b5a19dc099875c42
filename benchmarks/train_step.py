"""The whole training step on one device: Transformer, same-param Transformer and LPA, in several loops.

* bare: our decoder and PyTorch's fused AdamW, no DeepSpeed;
* engine: what training runs; on one device it goes without DeepSpeed, unless it offloads;
* llama: the dense model in Llama's form as transformers runs it, with torch.compile and the same AdamW;
* on request llama_plain: the same without torch.compile, and official: the model of the paper's public code,
  which has to lie in build/LPA.

All keep fp32 master weights and sum gradients in fp32 (benchmarks/step_loops.py says why). Ids are random,
and so are weights. Each model is measured in a process of its own, one after another, and again in the
opposite order, so that a drift of the machine hits all alike and shows; with --one-process in turns of a few
steps. Models that are compared with each other form a group, which is finished in both orders before the next
one starts: if time runs out, the first comparisons are whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_timing import describe, setting_of
from benchmarks.machine import versions_of, warn_if_busy, write_result
from benchmarks.official_code import official_file
from benchmarks.step_config import LOOPS, PEERS, Contender
from benchmarks.step_figures import Record, comparisons, measured, table, throughput
from benchmarks.step_runs import run_in_process, run_together
from benchmarks.step_timing import CLOCKS, failure
from megatron_lpa.config import ModelConfig
from megatron_lpa.errors import UserError
from megatron_lpa.train.hardware import peak_flops_per_second

HELP = "the whole training step: Transformer against LPA, bare loop against engine and against Llama"
VARIANTS = ("transformer", "same_param", "lpa")
PACKAGES = ("torch", "triton", "deepspeed", "transformers")
NEEDED = {"engine": "deepspeed", "llama": "transformers", "llama_plain": "transformers"}
"""The package that a loop needs besides torch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="3b", metavar="FAMILY", help="family of presets, as 3b or s2_small (default: 3b)")  # fmt: skip  # noqa: E501
    parser.add_argument("--models", nargs="+", default=list(VARIANTS), metavar="VARIANT", help=f"variants of the family (default: {' '.join(VARIANTS)})")  # fmt: skip  # noqa: E501
    parser.add_argument(
        "--loops", nargs="+", choices=LOOPS + PEERS, default=list(LOOPS), help=f"default: {' '.join(LOOPS)}"
    )
    parser.add_argument("--micro-batch", type=int, default=4, metavar="N", help="sequences per forward pass (default: 4)")  # fmt: skip  # noqa: E501
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per step (default: 1)")  # fmt: skip  # noqa: E501
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="steps measured of each, over all rounds (default: 30)")  # fmt: skip  # noqa: E501
    parser.add_argument(
        "--warm-up", type=int, default=4, metavar="N", help="steps before measuring (default: 4)"
    )
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="turns of each model (default: 2)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers instead of the preset's")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens per sequence instead of the preset's")  # fmt: skip  # noqa: E501
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run, as kernels.lowdim=joined; can be given again")  # fmt: skip  # noqa: E501
    parser.add_argument("--one-process", action="store_true", help="all models at once in memory, in turns of a few steps; for small models")  # fmt: skip  # noqa: E501
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: time that this process computed, for a shared machine without a GPU; needs --one-process")  # fmt: skip  # noqa: E501
    parser.add_argument("--minutes", type=float, metavar="N", help="no process starts after this")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to record the result, after each model")  # fmt: skip  # noqa: E501


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table, records where asked.

    Raises:
        UserError: a number that cannot be, or a model that does not exist.
    """
    for name in ("micro_batch", "accumulate", "steps", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; give 1 or more")
    if arguments.rounds > arguments.steps:
        raise UserError(f"--rounds is {arguments.rounds}; give --steps at least as many")
    if arguments.clock == "cpu" and (torch.cuda.is_available() or not arguments.one_process):
        raise UserError("--clock cpu measures a CPU with all models in one process; add --one-process")
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    last = None
    for last in results(arguments, deadline):
        write_result(arguments.output, last)
    assert last is not None
    print(table(last["contenders"], last["comparisons"]))


def contenders_of(arguments: argparse.Namespace) -> list[Contender]:
    """Every model in every loop that can run it, those of one ``group_of`` next to each other.

    Raises:
        UserError: an unknown preset, key or value.
    """
    small = {"layers": 1, "sequence": 16, "dry": True} if arguments.dry_run else {}
    found = []
    for loop in arguments.loops:
        for variant in arguments.models:
            if loop.startswith("llama") and variant != "transformer":
                continue  # it is there for the dense model's speed
            contender = Contender(
                preset=f"{'tiny' if arguments.dry_run else arguments.preset}/{variant}",
                loop=loop,
                micro_batch=1 if arguments.dry_run else arguments.micro_batch,
                accumulate=arguments.accumulate,
                precision="fp32" if arguments.dry_run else arguments.precision,
                settings=tuple(arguments.set),
                **{"layers": arguments.layers, "sequence": arguments.sequence, **small},
            )
            config = contender.config()
            if loop == "official":
                official_file(config.model)
            found.append(contender)
    if not found:
        raise UserError("Llama's loops run the transformer only; add it to --models, or choose another loop")
    return sorted(found, key=group_of)


def group_of(contender: Contender) -> int:
    """Smaller is more telling: Transformer and LPA in the bare loop and in the engine, then Llama; the model
    with the least to tell last."""
    if contender.preset.endswith("/same_param"):
        return 2
    return 1 if contender.loop == "llama" else 0


def unmeasured(arguments: argparse.Namespace, known: Sequence[Record]) -> list[Contender]:
    """The contenders that no known record is about.

    Args:
        arguments: as ``add_arguments`` defines them.
        known: records of an earlier result.
    """
    about = [record["contender"] for record in known]
    return [contender for contender in contenders_of(arguments) if described(contender) not in about]


def described(contender: Contender) -> dict[str, Any]:
    """A contender as it stands in a result."""
    return dataclasses.asdict(contender) | {"settings": list(contender.settings)}


def results(
    arguments: argparse.Namespace, deadline: float | None, known: Sequence[Record] = (), call: int = 1
) -> Iterator[dict[str, Any]]:
    """The whole result, anew after every measurement.

    Args:
        arguments: as ``add_arguments`` defines them.
        deadline: on the clock of ``time.monotonic``; what is then running is ended.
        known: records that are kept, and not measured again where they are about the same contender.
        call: number of the call that measures; new records carry it.
    """
    contenders = contenders_of(arguments)
    models = [contender.config().model for contender in contenders]
    kept = [record for record in known if record["contender"] not in map(described, contenders)]
    setting = setting_of(arguments.dry_run, 0.0)
    head = {"benchmark": "train-step", **describe(setting), "versions": versions_of(PACKAGES)}
    head |= {
        "dtype": contenders[0].precision,
        "threads": torch.get_num_threads(),
        "one_process": arguments.one_process or arguments.dry_run,
        "clock": arguments.clock,
        "settings": list(arguments.set),
    }
    warn_if_busy(head["machine"])
    warm_up, steps = (1, 1) if arguments.dry_run else (arguments.warm_up, arguments.steps)
    rounds = 1 if arguments.dry_run else arguments.rounds
    head["rounds"] = rounds
    found = [known_or_missing(contender, known) for contender in contenders]
    pending = [index for index, result in enumerate(found) if not result]
    if head["one_process"]:
        asked = [contenders[index] for index in pending]
        steps_each = -(-steps // rounds)
        together = run_together(asked, rounds, warm_up, steps_each, deadline, arguments.clock)
        for index, result in zip(pending, together, strict=True):
            found[index] = result | {"call": call}
        yield finished(head, contenders, models, found, kept)
        return
    yield finished(head, contenders, models, found, kept)
    asked_turns = [(number, index) for number, index in turns(contenders, rounds) if index in pending]
    for done, (number, index) in enumerate(asked_turns):
        left = None if deadline is None else deadline - time.monotonic()
        if "error" in found[index] or (left is not None and left <= 0):
            continue
        limit_s = None if left is None else fair_limit_s(left, len(asked_turns) - done)
        turn = run_in_process(contenders[index], warm_up, -(-steps // rounds), limit_s)
        found[index] = joined(found[index], turn) | {"call": call}
        print(f"{contenders[index].name}, round {number + 1}: {outcome(turn)}", flush=True)
        yield finished(head, contenders, models, found, kept)


def fair_limit_s(left_s: float, processes: int) -> float:
    """What one process may take, so that one that hangs leaves time to the others: twice its share, and a
    minute at least."""
    return min(left_s, max(60.0, 2 * left_s / processes))


def turns(contenders: Sequence[Contender], rounds: int) -> Iterator[tuple[int, int]]:
    """Round and index of each process, group by group, every other round in the opposite order."""
    for _, group in itertools.groupby(range(len(contenders)), key=lambda index: group_of(contenders[index])):
        members = list(group)
        for number in range(rounds):
            for index in members if number % 2 == 0 else reversed(members):
                yield number, index


def known_or_missing(contender: Contender, known: Sequence[Record]) -> dict[str, Any]:
    """A known record as if it had just been measured, the failure of ``missing``, or nothing."""
    for record in known:
        if record["contender"] == described(contender):
            rounds = record.get("all_steps_ms")
            return record | ({} if rounds is None else {"rounds_ms": rounds})
    return missing(contender)


def missing(contender: Contender) -> dict[str, Any]:
    """The failure of a loop whose package is not there: known without the seconds that a process takes to
    start."""
    package = NEEDED.get(contender.loop)
    if package is None or importlib.util.find_spec(package) is not None:
        return {}
    return failure(ModuleNotFoundError(name=package))


def outcome(turn: dict[str, Any]) -> str:
    return (
        turn["error"][:200]
        if "error" in turn
        else f"{measured(turn['rounds_ms'])['step_ms']['median']:.1f} ms"
    )


def joined(before: dict[str, Any], turn: dict[str, Any]) -> dict[str, Any]:
    """A further round; one that fails leaves the earlier ones."""
    if "rounds_ms" not in before:
        return turn
    if "error" in turn:
        kinds = {kind: turn[kind] for kind in ("out_of_time", "out_of_memory") if kind in turn}
        return before | kinds | {"later_error": turn["error"]}
    peaks = [turn["peak_memory_bytes"], before["peak_memory_bytes"]]
    return before | {
        "rounds_ms": before["rounds_ms"] + turn["rounds_ms"],
        "peak_memory_bytes": None if None in peaks else max(peaks),
    }


def finished(
    head: dict[str, Any],
    contenders: Sequence[Contender],
    models: Sequence[ModelConfig],
    found: Sequence[dict[str, Any]],
    kept: Sequence[Record] = (),
) -> dict[str, Any]:
    """The result with every figure that follows from the times, and after it records that are only kept."""
    peak = peak_flops_per_second(None)
    records: list[Record] = []
    by_name = {}
    for contender, model, result in zip(contenders, models, found, strict=True):
        by_name[contender.preset, contender.loop] = model
        tokens = contender.micro_batch * contender.accumulate * model.sequence_length
        record: Record = {
            "preset": contender.preset,
            "loop": contender.loop,
            "contender": described(contender),
            "layers": model.num_layers,
            "layers_changed": contender.layers is not None,
            "sequence_length": model.sequence_length,
            "ffn_hidden_size": model.ffn_hidden_size,
            "micro_batch": contender.micro_batch,
            "accumulate": contender.accumulate,
            "tokens_per_step": tokens,
            **result,
        }
        # Rounded first: a record that is read back has to give the same figures.
        rounds = [[round(ms, 3) for ms in turn] for turn in record.pop("rounds_ms", [])]
        if rounds:
            record |= measured(rounds)
            record |= throughput(model, tokens, record["step_ms"]["median"], peak)
            record["all_steps_ms"] = rounds
        records.append(record)
    return {**head, "peak_flops_per_second": peak, "contenders": [*records, *kept], "comparisons": comparisons(records, by_name)}  # fmt: skip  # noqa: E501


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    run(own.parse_args())
