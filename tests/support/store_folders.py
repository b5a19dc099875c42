"""A folder of checkpoints of one small file each."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_lpa.checkpoint import store
from megatron_lpa.checkpoint.manifest import complete_checkpoints, sealed
from megatron_lpa.checkpoint.store import partial_of, publish
from megatron_lpa.files import sha256
from support.manifests import whole_manifest


def prepared(folder: Path, step: int, content: str, loss: float | None = None, **more: object) -> str:
    """A checkpoint of one small file under construction; returns its manifest."""
    final = folder / f"step_{step:08d}"
    partial = partial_of(final)
    store.remove(partial)
    (partial / "state").mkdir(parents=True)
    file = partial / "state" / "rank_00000.safetensors"
    file.write_text(content * 100)
    files = {"state/rank_00000.safetensors": {"bytes": len(content) * 100, "sha256": sha256(file)}}
    manifest = whole_manifest(step, files) | {"validation_loss": loss, **more}
    return json.dumps(sealed(manifest))


def written(folder: Path, step: int, content: str = "x", loss: float | None = None, **more: object) -> None:
    """A checkpoint of one small file, by way of ``publish``."""
    publish(folder / f"step_{step:08d}", prepared(folder, step, content, loss, **more))


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_checkpoints(folder)]


def failing(real, when):
    """The function, which fails where ``when`` says so of its arguments."""

    def call(*arguments, **options):
        if when(*arguments):
            raise OSError(5, "Input/output error")
        return real(*arguments, **options)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
