"""What has to be true after every start, and of every run that is complete."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_lpa.run_folder import CHECKPOINTS, MANIFEST, METRICS, STEP, checkpoint_name, step_of

SAME = ("tokens", "samples", "loss", "lr", "grad_norm", "skipped_steps", "perplexity", "tokens_evaluated")
"""Fields of records that follow from the run and not from the machine."""

FOREIGN = re.compile(r"Traceback|Fatal Python error|terminate called|Exception ignored|^chaos:", re.MULTILINE)
KNOWN_LINES = ("error: ", "warning: ", "note: ", "exit code 78: ")
ROUNDING = 1e-4


def checkpoint_folders(run: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, oldest first."""
    return sorted((run / CHECKPOINTS).glob(f"{STEP}*"), key=step_of)


def unsound(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty when the manifest and every file are as it says.

    Read here from the bytes, without the code that is being tested.
    """
    try:
        for path in checkpoint.rglob("*"):
            if not path.is_file() and not path.is_dir():
                return f"{path.name} is no file"  # and would be waited for
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        told_checksum = manifest.pop("checksum")
        if hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest() != told_checksum:
            return "the manifest differs from its checksum"
        for name, told in manifest["files"].items():
            content = (checkpoint / name).read_bytes()
            if len(content) != told["bytes"] or hashlib.sha256(content).hexdigest() != told["sha256"]:
                return f"{name} differs from the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def of_logs(errors: list[str]) -> list[str]:
    """Violations in what each rank wrote to stderr."""
    found = []
    for rank, text in enumerate(errors):
        if FOREIGN.search(text):
            found.append(f"rank {rank}'s log has a traceback or a crash: {_around(text)}")
            continue
        for line in text.splitlines():
            if line.endswith("go to stderr") and line.startswith("error: rank "):
                break  # stacks follow, of a process that hangs before the run folder is its own
            if not line.startswith(KNOWN_LINES):
                found.append(f"rank {rank} wrote a line of another kind: {line[:200]}")
                break
    return found


def _around(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()]
    return lines[-1][:300] if lines else ""


def records(run: Path) -> list[dict[str, Any]]:
    """All of ``metrics.jsonl``; raises where a line is not a record."""
    path = run / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of_complete_run(run: Path, reference: Path, steps: int, exact: bool) -> list[str]:
    """Violations of a run that is complete, compared with the same run undisturbed."""
    found = []
    leftovers = [path.name for path in (run / CHECKPOINTS).iterdir() if path.name.startswith(".")]
    if leftovers:
        found.append(f"left behind: {', '.join(leftovers)}")
    try:
        own, expected = records(run), records(reference)
    except ValueError as error:
        return [*found, f"metrics.jsonl is torn: {error}"]
    trained = [record["step"] for record in own if record["kind"] == "train"]
    if trained != list(range(1, steps + 1)):
        found.append(f"metrics.jsonl has the steps {trained}")
    for kind in ("train", "valid"):
        of_own = {r["step"]: r for r in own if r["kind"] == kind}
        of_reference = {r["step"]: r for r in expected if r["kind"] == kind}
        if of_own.keys() != of_reference.keys():
            found.append(f"{kind} records of steps {sorted(of_own)} instead of {sorted(of_reference)}")
            continue
        for step, record in of_reference.items():
            differing = [n for n in SAME if not _equal(record.get(n), of_own[step].get(n), exact, n)]
            if differing:
                name = differing[0]
                found.append(
                    f"step {step}: {kind} {name} is {of_own[step].get(name)}, not {record.get(name)}"
                )
                break
    found += _final_state(run, reference, steps, exact)
    return found


def _equal(expected: Any, value: Any, exact: bool, name: str) -> bool:
    if exact or expected is None or value is None or name not in ("loss", "grad_norm", "perplexity"):
        return bool(expected == value)
    return math.isclose(expected, value, rel_tol=ROUNDING)


def _final_state(run: Path, reference: Path, steps: int, exact: bool) -> list[str]:
    last, name = f"{CHECKPOINTS}/{checkpoint_name(steps)}", "the final checkpoint"
    if problem := unsound(run / last):
        return [f"{name}: {problem}"]
    if not exact:  # another layout divides the state in another way
        own = load_file(run / last / "weights/model.safetensors")
        other = load_file(reference / last / "weights/model.safetensors")
        far = [
            key
            for key in other
            if key not in own or not torch.allclose(own[key], other[key], rtol=1e-3, atol=1e-4)
        ]
        return [f"{name}: {far[0]} is far from the undisturbed run's"] if far else []
    own_files, other_files = _contents(run / last), _contents(reference / last)
    if own_files != other_files:
        names = [key for key in other_files if own_files.get(key) != other_files[key]] or sorted(own_files)
        return [f"{name}: {', '.join(names)} differ from the undisturbed run's"]
    return []


def _contents(checkpoint: Path) -> dict[str, str]:
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*.safetensors"))
    }
