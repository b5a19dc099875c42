#!/usr/bin/env python3
"""Whether every node of a job can train, before training starts.

    srun --ntasks-per-node=1 python tools/health_check.py node --gpus 8 --preset 3b/lpa \\
        --data.prefix data/pile | python tools/health_check.py judge node1 node2

``node`` runs once on each node, with the options of megatron_lpa.pretrain: GPUs, free disk, folders that can
be written, datasets, versions. It prints what it found in lines of JSON and always ends with 0. ``judge``
reads the lines of all nodes, compares versions and clocks, says which node has which problem, and ends with 1
if there is any.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import megatron_lpa
from megatron_lpa.checkpoint.manifest import complete_checkpoints
from megatron_lpa.checkpoint.store import retention_of
from megatron_lpa.command_line import command, run_tool
from megatron_lpa.config import RunConfig, load_config
from megatron_lpa.config.run import DataConfig
from megatron_lpa.data.storage.dataset_manifest import manifest_path, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.engine.ds_config import read_zero_knobs
from megatron_lpa.errors import UserError, shown
from megatron_lpa.files import files_below, is_dir, status, tree_digest
from megatron_lpa.planning.parameters import count_parameters
from megatron_lpa.run_folder import CHECKPOINTS, SNAPSHOT

logger = logging.getLogger("megatron_lpa.tools.health_check")

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "triton")
MAX_SKEW_S = 30.0
# fp32 master and two moments, and the weights in the run's precision, with room to spare.
CHECKPOINT_BYTES_PER_PARAMETER = 20
MAX_GPU_SHARE_IN_USE = 0.1
LATEST_S = 1e12  # no clock shows more seconds
LONGEST = 600  # characters of a problem: srun keeps lines of several nodes apart only while they are short


# On a node


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def problems_of_node(config: RunConfig, gpus: int) -> Iterator[str]:
    """Everything that keeps this node from training, in words."""
    assert config.logging.name is not None
    run = Path(config.logging.run_dir) / config.logging.name
    yield from gpu_problems(gpus)
    if not is_dir(run / SNAPSHOT):
        yield (
            f"does not see {(run / SNAPSHOT).absolute()}; the run folder has to be on a file system that all "
            "nodes share"
        )
    else:
        yield from folder_problems(run)
        yield from disk_problems(run, config)
    yield from folder_problems(Path(tempfile.gettempdir()))
    try:
        read_zero_knobs(config.train.deepspeed_config, config.train.precision)
    except UserError as error:
        yield str(error)
    for prefix in prefixes_of(config.data):
        yield from dataset_problems(prefix)


def gpu_problems(expected: int) -> Iterator[str]:
    """GPUs that are missing, do not compute, or are used by somebody else."""
    if expected == 0:
        return
    try:
        import torch

        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:
        yield f"torch cannot look for GPUs: {error}"
        return
    if visible < expected:
        yield (
            f"{visible} of {expected} GPUs are visible to torch {torch.__version__} "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}); "
            "check the driver, the build of torch and --gpus-per-node, or set DEVICE=cpu"
        )
    for number in range(min(visible, expected)):
        name = f"GPU {number}"
        try:
            free, total = torch.cuda.mem_get_info(number)
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            if float((ones @ ones).sum()) != 64.0**3:
                yield f"{name} computes wrong results"
        except Exception as error:
            yield f"{name} does not work: {error}"
            continue
        if total - free > MAX_GPU_SHARE_IN_USE * total:
            yield (
                f"{name} has {(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB in use by another "
                "process"
            )


def folder_problems(folder: Path) -> Iterator[str]:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".health-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        yield f"{folder.absolute()} cannot be written: {error.strerror or error}"


def disk_problems(run: Path, config: RunConfig) -> Iterator[str]:
    """Too little room for the checkpoints that are still to come before old ones are removed."""
    complete = complete_checkpoints(run / CHECKPOINTS)
    size = CHECKPOINT_BYTES_PER_PARAMETER * count_parameters(config.model).total
    if complete:
        size = sum(found.st_size for path in files_below(complete[-1]) if (found := status(path)))
    kept = retention_of(config.train)
    # The newest, the newest at the interval where later ones were written at stops, the best, and the one
    # being written.
    most = kept.newest + bool(kept.interval) + kept.best + 1 if kept.newest else 1
    number = max(1, most - len(complete))
    free = shutil.disk_usage(run).free
    if free < number * size:
        yield (
            f"{run.absolute()} has {free / 1e9:,.1f} GB free, but {number} checkpoints of about "
            f"{size / 1e9:,.1f} GB are to come; free some space or lower train.keep_checkpoints"
        )


def prefixes_of(data: DataConfig) -> list[str]:
    """Every dataset of the run."""
    single = [data.prefix, data.train_prefix, data.valid_prefix, data.test_prefix]
    return [prefix for prefix in [*single, *(data.blend or {})] if prefix is not None]


def dataset_problems(prefix: str) -> Iterator[str]:
    """Headers, sizes and the manifest; ``tools/inspect_dataset.py --verify`` reads everything."""
    try:
        dataset = IndexedDataset(prefix, check=False)
        manifest = read_manifest(prefix)
    except UserError as error:
        yield str(error)
        return
    if manifest is not None and (manifest.tokens, manifest.documents) != (
        dataset.num_tokens, dataset.num_documents,
    ):  # fmt: skip
        yield (
            f"{manifest_path(prefix)} tells of {manifest.tokens:,} tokens in {manifest.documents:,} "
            f"documents, but the files hold {dataset.num_tokens:,} in {dataset.num_documents:,}; they do not "
            "belong together"
        )


def facts_of_node(gpus: int) -> dict[str, str]:
    """What has to be equal on all nodes."""
    facts = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "megatron_lpa": code_digest(),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "none"
    if gpus:
        import torch

        names = {torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
        facts["GPU"] = ", ".join(sorted(names)) or "none"
    return facts


def code_digest() -> str:
    package = Path(megatron_lpa.__file__).parent
    return f"code {tree_digest(package, files_below(package, ['*.py']))[:12]}"


def look(gpus: int, options: Sequence[str]) -> None:
    """Print a line for the clock, one for each problem, and one to end with."""

    def say(**content: Any) -> None:
        print(json.dumps({"node": node_name(), **content}), flush=True)

    say(time=time.time())
    try:
        for problem in problems_of_node(load_config(options), gpus):
            say(problem=problem[:LONGEST])
        say(facts=facts_of_node(gpus))
    except Exception as error:  # whatever it is, the other nodes' reports are worth having
        say(problem=f"{type(error).__name__}: {error}"[:LONGEST], facts={})


# Where all reports arrive


def judge(lines: Iterable[str], nodes: Sequence[str]) -> list[str]:
    """All problems of all nodes; an empty list when training can start.

    Args:
        lines: of all nodes, as they arrive: a clock is compared with ours at that moment.
        nodes: that have to report.
    """
    problems: list[str] = []
    facts: dict[str, dict[str, str]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            report = json.loads(line)
            node = report["node"]
            key = _not_as_written(report)
            strange = shown(report[key]) if key else ""
        except RecursionError:
            logger.info(f"line {number}: {shown(line)}: nested too deeply for a report")
            continue
        except (ValueError, TypeError, KeyError):
            print(line, end="", file=sys.stderr)  # a library's own words
            continue
        if key:
            problems.append(f"line {number}: {strange} is no {key} of a report")
            continue
        if "time" in report and abs(skew := report["time"] - time.time()) > MAX_SKEW_S:
            problems.append(
                f"{node}: its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}; set up NTP "
                "there"
            )
        if "problem" in report:
            problems.append(f"{node}: {report['problem']}")
        if "facts" in report:
            facts[node] = report["facts"]
    problems += [
        f"{node}: did not report; look above for what it said" for node in nodes if node not in facts
    ]
    return problems + list(_differences(facts))


def _not_as_written(report: dict[str, Any]) -> str | None:
    """The first key of a report whose value :func:`look` cannot have written, None if there is none."""
    checks: dict[str, Callable[[Any], bool]] = {
        "node": lambda value: isinstance(value, str) and value.isprintable(),
        "time": lambda value: (
            type(value) in (int, float) and abs(value) < LATEST_S
        ),  # not a number is not below
        "problem": lambda value: isinstance(value, str),
        "facts": lambda value: (
            isinstance(value, dict) and all(isinstance(fact, str) for fact in value.values())
        ),
    }
    return next((key for key, check in checks.items() if key in report and not check(report[key])), None)


def _differences(facts: dict[str, dict[str, str]]) -> Iterator[str]:
    for name in dict.fromkeys(name for of_node in facts.values() for name in of_node):
        nodes_with: dict[str, list[str]] = {}
        for node, of_node in facts.items():
            if name in of_node:
                nodes_with.setdefault(of_node[name], []).append(node)
        if len(nodes_with) > 1:
            described = "; ".join(f"{value} on {', '.join(nodes)}" for value, nodes in nodes_with.items())
            yield f"{name} differs: {described}"


@command()
def main(argv: Sequence[str]) -> int:
    """0, or 1 when a node cannot train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    node = commands.add_parser("node", help="look at this node", allow_abbrev=False)
    node.add_argument("--gpus", type=int, default=0, help="that have to work; 0 for a CPU run")
    judging = commands.add_parser("judge", help="read the reports of all nodes", allow_abbrev=False)
    judging.add_argument("nodes", nargs="*", metavar="NODE", help="that have to report")
    arguments, options = parser.parse_known_args(argv)
    if arguments.command == "node":
        look(arguments.gpus, options)
        return 0
    if options:
        parser.error(f"unknown options: {' '.join(options)}")
    problems = judge(sys.stdin, arguments.nodes)
    for problem in problems:
        logger.error(problem)
    if not problems:
        print(f"all {len(arguments.nodes)} nodes can train", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
