"""Checkpoints as data from outside: sealed lies, a disk that hiccups between hash and use, what is left after
a rename."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.manifests import put
from support.models import MODELS
from support.world import groups_for

from megatron_lpa.checkpoint.manifest import checkpoint_folders, read_manifest
from megatron_lpa.checkpoint.progress import Progress, SampleOrder
from megatron_lpa.checkpoint.store import Retention, tidy
from megatron_lpa.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.run_folder import MANIFEST

ORDER = SampleOrder(seed=27, samples_per_epoch=1000, samples_per_step=8, data={"hash": "abc"})
RUN = RunConfig(
    model=MODELS["s1_lpa"],
    parallel=ParallelConfig(2, "column_row"),
    optim=OptimConfig(lr=1e-2, warmup_steps=0),
    train=TrainConfig(
        steps=9, global_batch_size=8, micro_batch_size=8, precision="bf16", deepspeed_config="zero1", keep_checkpoints=0  # noqa: E501
    ),
)  # fmt: skip
ALL = ["step_00000001", "step_00000002", "step_00000003"]


class Loaded(NamedTuple):
    """What one rank tells of ``load_newest``; masters of a checkpoint are all equal to its step."""

    step: int
    masters: float
    notes: tuple[str, ...]
    error: str
    again: bool


def keeping(newest: int) -> RunConfig:
    return replace(RUN, train=replace(RUN.train, keep_checkpoints=newest))


def save_steps(folder: str, steps: list[int], newest: int = 0, failing: str = "") -> list[str]:
    """Save with masters equal to the step; on rank 0 what follows the rename may fail. The names returned."""
    from megatron_lpa.checkpoint import saving, store
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(RUN, groups_for(2))
    sync, prune, names = store.fsync_folder, saving.prune, []

    def failing_sync(path: Any) -> None:
        if Path(path) == Path(folder):
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    if failing == "fsync":
        store.fsync_folder = failing_sync
    if failing == "killed":
        saving.prune = lambda *_: None
    try:
        for step in steps:
            for fragment in EngineState(engine).fragments():
                fragment.view("master").fill_(step)
            done = saving.begin_save(
                EngineState(engine), Path(folder), Progress(step, 8 * step), ORDER, Retention(newest)
            ).complete()
            names.append(done.name)
    finally:
        store.fsync_folder, saving.prune = sync, prune
        engine.destroy()
    return names


def load(folder: str, run: RunConfig = RUN, hiccup: tuple[str, int, int] | None = None) -> Loaded:
    """Load the newest; on rank 1 opening a file may fail so often, after so many times that it works."""
    from megatron_lpa import files
    from megatron_lpa.checkpoint.resume import load_newest
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(run, groups_for(2))
    real, pauses = os.open, files.PAUSES_S
    files.PAUSES_S = (0.0, 0.0, 0.0)
    if hiccup is not None and engine.groups.rank == 1:
        name, after, times = hiccup
        seen = 0

        def opened(path: Any, *arguments: Any, **options: Any) -> int:
            nonlocal seen
            if str(path).endswith(name):
                seen += 1
                if after < seen <= after + times:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(path, *arguments, **options)

        os.open = opened
    try:
        found = load_newest(EngineState(engine), checkpoint_folders(Path(folder)), ORDER)
        (value,) = {float(v) for f in EngineState(engine).fragments() for v in f.view("master").unique()}
    except UserError as error:
        return Loaded(-1, 0.0, (), str(error), isinstance(error, TryAgain))
    finally:
        os.open, files.PAUSES_S = real, pauses
        engine.destroy()
    return Loaded(found.progress.step, value, found.notes, "", False)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def three(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    assert world(2).run(save_steps, str(folder), [1, 2, 3]) == [ALL, ALL]
    return folder


@pytest.fixture
def copied(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


LIES: dict[str, Any] = {
    "bytes: 1e400": lambda m: m["files"]["state/rank_00001.safetensors"].update(bytes=float("inf")),
    "no order": lambda m: m.pop("order"),
    "a processes' size": lambda m: m["layout"].update(tensor_parallel_size=10**9),
    "no tp_dim": lambda m: m["state"]["parameters"].popitem()[1].pop("tp_dim") or m["state"].pop("parameters"),  # noqa: E501
    "a model that is a list": lambda m: m.update(model=[]),
    "no parameter of a name": lambda m: m["state"]["parameters"].popitem(),
    "another shape": lambda m: next(p for p in m["state"]["parameters"].values() if len(p["shape"]) == 1).update(shape=[2]),  # noqa: E501
    "NaN as steps": lambda m: m["state"].update(skipped_steps=float("nan")),
}  # fmt: skip


def test_a_sealed_lie_costs_one_checkpoint_and_no_traceback(world, copied):
    original = json.loads((copied / "step_00000003" / MANIFEST).read_text())
    del original["checksum"]
    for words, change in LIES.items():
        lying = copy.deepcopy(original)
        change(lying)
        put(copied / "step_00000003", lying)
        for found in world(2).run(load, str(copied)):
            assert (found.step, found.masters, found.error) == (2, 2.0, ""), (words, found)
            assert len(found.notes) == 1 and "\n" not in found.notes[0] and len(found.notes[0]) < 800, words
        assert names_in(copied) == ["damaged_step_00000003", *ALL[:2]], words
        os.rename(copied / "damaged_step_00000003", copied / "step_00000003")


def test_a_disk_that_hiccups_after_the_hash_costs_nothing(world, copied):
    """Rank 1 opens the file for its hash, for its header, and for what is in it."""
    for after in (0, 1, 2):
        for found in world(2).run(
            load, str(copied), RUN, ("step_00000003/state/rank_00001.safetensors", after, 2)
        ):
            assert (found.step, found.masters, found.notes) == (3, 3.0, ()), (after, found)
    for after in (0, 1, 2):
        lasting = ("step_00000003/state/rank_00001.safetensors", after, 10**6)
        for found in world(2).run(load, str(copied), RUN, lasting):
            assert found.again and "rank 1: " in found.error and "Stale file handle" in found.error, after
    assert names_in(copied) == ALL


def test_what_fails_after_the_rename_is_a_warning_and_retention_goes_on(world, tmp_path):
    for names in world(2).run(save_steps, str(tmp_path), [1, 2, 2], 1, "fsync"):
        assert names == ["step_00000001", "step_00000002", "step_00000002"]
    tidy(tmp_path)
    assert names_in(tmp_path) == ["step_00000002"]
    assert world(2).run(load, str(tmp_path))[1].step == 2


def test_a_start_removes_what_a_killed_process_would_have(world, tmp_path):
    world(2).run(save_steps, str(tmp_path), [1, 2, 3], 1, "killed")
    assert names_in(tmp_path) == ALL
    (tmp_path / "step_00000003/state/rank_00000.safetensors").unlink()
    (tmp_path / "step_00000002" / MANIFEST).write_text("{")
    assert world(2).run(load, str(tmp_path), keeping(1))[0].step == 1
    assert names_in(tmp_path) == ["damaged_step_00000002", "damaged_step_00000003", "step_00000001"]


def test_nothing_is_removed_before_one_is_loaded(world, copied):
    for step in (1, 2, 3):
        (copied / f"step_0000000{step}/state/rank_00000.safetensors").unlink()
    assert "holds no checkpoint that is intact" in world(2).run(load, str(copied), keeping(1))[0].error
    assert names_in(copied) == ALL


def load_without_renaming(folder: str) -> int:
    from megatron_lpa.checkpoint import store

    def refused(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    real = store.os.rename
    try:
        store.os.rename = refused
        return load(folder, keeping(1)).step
    finally:
        store.os.rename = real


def test_one_that_cannot_be_set_aside_takes_no_other_s_place(world, copied):
    (copied / "step_00000003/state/rank_00000.safetensors").unlink()
    assert world(2).run(load_without_renaming, str(copied)) == [2, 2]
    assert names_in(copied) == ALL
    assert read_manifest(copied / "step_00000002")["progress"].step == 2
