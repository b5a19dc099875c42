"""Results of the GPU suite that a later call goes on with: what they are measured by, and which figures
stay."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.commands import ROOT
from megatron_lpa.errors import UserError

FORMAT = 1
"""Of the result. Another number means that figures are kept in other places, or mean something else."""

WAY_OUT = "measure anew, without --continue"


def code_digest() -> str:
    """Over the code that figures depend on: every module of ``megatron_lpa`` and ``benchmarks``."""
    found = hashlib.sha256()
    for folder in ("megatron_lpa", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def circumstances(result: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal for figures to stand side by side, in words."""
    return {
        "format": result["format"],
        "GPU": result["device"].get("name", result["device"]["type"]),
        "torch": result["versions"]["torch"],
        "Triton": result["versions"]["triton"],
        "dry run": result["dry_run"],
    }


def read_earlier(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """An earlier result without what failed or was not finished.

    Args:
        path: of the result.
        now: the result that this call begins with; gives its circumstances.

    Raises:
        UserError: no such file, a damaged one, or one measured in other circumstances.
    """
    try:
        earlier = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"--continue {path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--continue {path}: cannot be read as a result ({error}); {WAY_OUT}") from error
    if not isinstance(earlier, dict) or earlier.get("benchmark") != "gpu-suite":
        raise UserError(f"--continue {path}: not a result of the GPU suite; {WAY_OUT}")
    if earlier.get("format") != FORMAT:
        raise UserError(f"--continue {path}: format {earlier.get('format')}, here {FORMAT}; {WAY_OUT}")
    try:
        before, here = circumstances(earlier), circumstances(now)
        differing = [
            f"{name} {before[name]}, here {here[name]}" for name in here if before[name] != here[name]
        ]
        if not differing:
            return finished_figures(earlier)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--continue {path}: damaged ({error!r} in it); {WAY_OUT}") from error
    raise UserError(f"--continue {path}: it was measured with {'; '.join(differing)}; {WAY_OUT}")


def finished_figures(earlier: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what failed or ended early, down to one model or one variant."""
    kept = dict(earlier)
    kept["tests"] = {name: run for name, run in earlier.get("tests", {}).items() if run["passed"]}
    for key in ("train_step", "train_step_65k", "train_memory"):
        if key in earlier:
            step = earlier[key]
            kept[key] = step | {
                "contenders": [r for r in step["contenders"] if has_all_rounds(r, step["rounds"])]
            }
    kept["profile"] = {
        name: found for name, found in earlier.get("profile", {}).items() if "error" not in found
    }
    kept["kernel"] = [without_errors(record) for record in earlier.get("kernel", [])]
    if "evaluate_step" in earlier:
        step = earlier["evaluate_step"]
        kept["evaluate_step"] = step | {
            "models": [r for r in step["models"] if r.get("steps", 0) >= step.get("steps", 1)]
        }
    return kept


def has_all_rounds(record: dict[str, Any], rounds: int) -> bool:
    """Whether a contender was measured as often as it should."""
    done = len(record.get("all_steps_ms", [])) >= rounds
    return done and "error" not in record and "later_error" not in record


def without_errors(record: dict[str, Any]) -> dict[str, Any]:
    """A projection's record with the variants that have figures."""
    return {
        key: {name: figures for name, figures in value.items() if "error" not in figures}
        if key in ("plain", "with_norm_and_rotary")
        else value
        for key, value in record.items()
    }
