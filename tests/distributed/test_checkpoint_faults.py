"""Damaged checkpoints, failed writes and kills inside a save: what is left, and what a run continues from."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from support.models import MODELS
from support.world import groups_for

from megatron_lpa.checkpoint.manifest import complete_checkpoints, read_manifest, sealed
from megatron_lpa.checkpoint.progress import Progress, SampleOrder
from megatron_lpa.checkpoint.store import checkpoint_folders, damaged_folders, tidy
from megatron_lpa.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_lpa.errors import UserError
from megatron_lpa.run_folder import DAMAGE_NOTE, MANIFEST

ORDER = SampleOrder(seed=27, samples_per_epoch=1000, samples_per_step=8)
RUN = RunConfig(
    model=MODELS["s1_lpa"],
    parallel=ParallelConfig(2, "latent"),
    optim=OptimConfig(lr=1e-2, warmup_steps=0),
    train=TrainConfig(
        steps=9, global_batch_size=8, micro_batch_size=8, precision="bf16", deepspeed_config="zero3"
    ),
)


class Loaded(NamedTuple):
    """What one rank tells of ``load_newest``; ``scale`` is what all its masters were set to when saved."""

    step: int
    scale: float
    notes: tuple[str, ...]
    error: str


def set_masters(engine, value: float) -> None:
    from megatron_lpa.engine.engine_state import EngineState

    for fragment in EngineState(engine).fragments():
        fragment.view("master").fill_(value)


def masters(engine) -> float:
    """The value of all masters of this rank; they must be one."""
    from megatron_lpa.engine.engine_state import EngineState

    (value,) = {float(v) for f in EngineState(engine).fragments() for v in f.view("master").unique()}
    return value


def save_steps(folder: str, steps: int) -> None:
    """Checkpoints of steps 1 to ``steps``, in each of which every master is the step."""
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(RUN, groups_for(2))
    for step in range(1, steps + 1):
        set_masters(engine, step)
        begin_save(EngineState(engine), Path(folder), Progress(step, 8 * step), ORDER).complete()
    engine.destroy()


def load(folder: str) -> Loaded:
    from megatron_lpa.checkpoint.resume import load_newest
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(RUN, groups_for(2))
    try:
        found = load_newest(EngineState(engine), checkpoint_folders(Path(folder)), ORDER)
    except UserError as error:
        return Loaded(-1, 0.0, (), str(error))
    finally:
        engine.destroy()
    return Loaded(found.progress.step, masters(engine), found.notes, "")


@pytest.fixture(scope="module")
def three(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    world(2).run(save_steps, str(folder), 3)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


RANK_1 = "state/rank_00001.safetensors"
DAMAGES = {
    "a bit of a state": lambda c: flip(c / RANK_1),
    "a state cut": lambda c: os.truncate(c / RANK_1, 100),
    "a state missing": lambda c: (c / RANK_1).unlink(),
    "states swapped": lambda c: swap(c / RANK_1, c / "state/rank_00000.safetensors"),
    "the state of another step": lambda c: shutil.copy(c.with_name("step_00000001") / RANK_1, c / RANK_1),
    "a bit of the weights": lambda c: flip(c / "weights/model.safetensors"),
    "a bit of the manifest": lambda c: flip(c / MANIFEST),
    "the manifest missing": lambda c: (c / MANIFEST).unlink(),
    "the manifest of another step": lambda c: shutil.copy(
        c.with_name("step_00000001") / MANIFEST, c / MANIFEST
    ),
    "an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_intact_checkpoint_is_used_and_the_damaged_one_is_set_aside(
    world, three, tmp_path, damage
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    DAMAGES[damage](folder / "step_00000003")
    results = world(2).run(load, str(folder))
    assert results[0] == results[1]
    step, scale, notes, _ = results[0]
    assert (step, scale) == (2, 2.0)
    assert len(notes) == 1 and notes[0].startswith("step_00000003 was skipped: ") and str(folder) in notes[0]
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000001", "step_00000002"]
    (aside,) = damaged_folders(folder)
    assert notes[0].partition(": ")[2] in (aside / DAMAGE_NOTE).read_text()


def test_several_damaged_ones_are_skipped_and_when_none_is_left_nothing_is_renamed(world, three, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    flip(folder / "step_00000003" / RANK_1)
    flip(folder / "step_00000002" / "weights" / "model.safetensors")
    step, scale, notes, _ = world(2).run(load, str(folder))[1]
    assert (step, scale, len(notes)) == (1, 1.0, 2)
    assert len(damaged_folders(folder)) == 2
    flip(folder / "step_00000001" / MANIFEST)
    for result in world(2).run(load, str(folder)):
        assert "holds no checkpoint that is intact" in result.error and "step_00000001: " in result.error
        assert "start anew under another logging.name" in result.error
    assert [path.name for path in checkpoint_folders(folder)] == ["step_00000001"]


def test_fragments_that_are_missing_from_intact_files_are_found(world, three, tmp_path):
    """Only a fault in writing could make such a checkpoint, whose every hash is right."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    path = folder / "step_00000003" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["files"][RANK_1]
    path.write_text(json.dumps(sealed(manifest)))
    step, scale, notes, _ = world(2).run(load, str(folder))[0]
    assert (step, scale) == (2, 2.0) and "is in no file" in notes[0]


def test_nothing_in_a_checkpoint_is_pickled_and_permissions_follow_the_umask(three):
    files = [path for path in three.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert len(files) == 3 * 4
    umask = os.umask(0)
    os.umask(umask)
    for path in three.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_the_engine_never_unpickles() -> None:
    engine = Path(__file__).parents[2] / "megatron_lpa" / "engine"
    for path in engine.rglob("*.py"):
        assert not [
            word for word in ("torch.load", "pickle.load", "import pickle") if word in path.read_text()
        ]


def save_with_little_space(folder: str, free_bytes: int) -> str:
    from megatron_lpa.checkpoint.saving import CheckpointNotWritten, begin_save
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(RUN, groups_for(2))
    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=free_bytes)
    try:
        begin_save(EngineState(engine), Path(folder), Progress(1), ORDER).complete()
    except CheckpointNotWritten as error:
        return str(error)
    finally:
        shutil.disk_usage = real
        engine.destroy()
    return ""


def test_space_is_compared_before_anything_is_written(world, tmp_path):
    folder = tmp_path / "checkpoints"
    assert world(2).run(save_with_little_space, str(folder), 10**9) == ["", ""]
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    shutil.rmtree(folder)
    for message in world(2).run(save_with_little_space, str(folder), written * 2 // 3):
        assert "a checkpoint takes" in message and "are free" in message and "free disk space" in message
    assert list(folder.iterdir()) == []


class Killed(BaseException):
    """The process ends here."""


CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "open")


def killed_saves(folder: str) -> list[tuple[int, int, float]]:
    """One save after another, each cut off after one more operation; what is loaded after each."""
    from megatron_lpa.checkpoint.resume import load_newest
    from megatron_lpa.checkpoint.saving import begin_save
    from megatron_lpa.checkpoint.store import Retention
    from megatron_lpa.engine.build import build_engine
    from megatron_lpa.engine.engine_state import EngineState

    engine = build_engine(replace(RUN, parallel=ParallelConfig(1, "column_row")), groups_for(1))
    real = {name: getattr(os, name) for name in CALLS}
    found = []
    finished = False
    while not finished:
        allowed, calls = len(found), 0
        own = Path(folder) / str(allowed)
        for step in (1, 2):
            set_masters(engine, step)
            begin_save(EngineState(engine), own, Progress(step), ORDER).complete()

        def counted(name: str):
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls > allowed:  # noqa: B023
                    raise Killed
                return real[name](*arguments, **options)

            return call

        set_masters(engine, 3)
        for name in CALLS:
            setattr(os, name, counted(name))
        try:
            begin_save(EngineState(engine), own, Progress(3), ORDER, Retention(newest=2)).complete()
            finished = True
        except Killed:
            pass
        finally:
            for name in CALLS:
                setattr(os, name, real[name])
        tidy(own)
        newest = load_newest(EngineState(engine), checkpoint_folders(own), ORDER)
        assert newest.notes == (), newest
        found.append((newest.progress.step, len(checkpoint_folders(own)), masters(engine)))
        shutil.rmtree(own)
    engine.destroy()
    return found


def test_a_kill_between_any_two_operations_of_a_save_leaves_the_last_one_or_the_new_one(world, tmp_path):
    found = world(1).run(killed_saves, str(tmp_path))[0]
    steps = [step for step, _, _ in found]
    assert steps == sorted(steps) and set(steps) == {2, 3}  # never older than the last complete one
    assert [value for _, _, value in found] == steps  # never a mixture of two
    assert found[-1] == (3, 2, 3.0) and len(found) > 15


def test_a_save_over_a_leftover_of_a_killed_one(world, tmp_path):
    leftover = tmp_path / ".step_00000001.partial" / "state"
    leftover.mkdir(parents=True)
    (leftover / "rank_00007.safetensors").write_text("torn")
    world(2).run(save_steps, str(tmp_path), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    files = read_manifest(tmp_path / "step_00000001")["files"]
    assert "state/rank_00007.safetensors" not in files and len(files) == 3
