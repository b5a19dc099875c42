"""Manifests that are sealed like good ones and say what none can say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_lpa.run_folder import MANIFEST

Manifest = dict[str, Any]


def malform(checkpoint: Path, sort: str) -> None:
    """Change the manifest of a checkpoint, and seal it anew.

    Args:
        checkpoint: the folder.
        sort: of ``kinds.MALFORMED``.
    """
    path = checkpoint / MANIFEST
    manifest = json.loads(path.read_text())
    if sort == "a-list":
        path.write_text(json.dumps([manifest]))
        return
    CHANGES[sort](manifest)
    manifest.pop("checksum")
    # Written here, and not by the code that is tested.
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "checksum": seal}))


def _put(*keys: str, value: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def _drop(*keys: str) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


def _of_first_file(key: str, value: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        manifest["files"][min(manifest["files"])][key] = value

    return change


def _outside(manifest: Manifest) -> None:
    first = min(manifest["files"])
    manifest["files"]["../" + first] = manifest["files"].pop(first)


def _shape_of_text(manifest: Manifest) -> None:
    parameters = manifest["state"]["parameters"]
    parameters[min(parameters)]["shape"] = "all"


CHANGES: dict[str, Callable[[Manifest], None]] = {
    "files-null": _put("files", value=None),
    "files-list": lambda manifest: manifest.update(files=sorted(manifest["files"])),
    "files-empty": _put("files", value={}),
    "bytes-text": _of_first_file("bytes", "many"),
    "bytes-infinite": _of_first_file("bytes", float("inf")),
    "hash-number": _of_first_file("sha256", 7),
    "name-outside": _outside,
    "progress-missing": _drop("progress"),
    "progress-negative": _put("progress", "consumed_samples", value=-8),
    "progress-true": _put("progress", "consumed_tokens", value=True),
    "state-missing": _drop("state"),
    "optimizer-step-text": _put("state", "optimizer_step", value="three"),
    "layout-null": _put("layout", value=None),
    "tensor-parallel-huge": _put("layout", "tensor_parallel_size", value=10**9),
    "model-list": _put("model", value=[]),
    "order-missing": _drop("order"),
    "parameters-null": _put("state", "parameters", value=None),
    "shape-text": _shape_of_text,
}
